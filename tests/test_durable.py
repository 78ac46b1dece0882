"""Durable files and sealed records: a flipped bit, a cut or a kill is always noticed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from harness import checkpoint, durable
from harness.contracts import HarnessError


def test_sealed_round_trip_and_every_flip_caught(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    durable.write_sealed(path, {"value": 1.25, "text": "grün", "list": [1, 2]})
    assert durable.read_sealed(path) == {"value": 1.25, "text": "grün", "list": [1, 2]}
    content = path.read_bytes()
    accepted = 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        # a flip in white space or of a letter's escape leaves the same value: that is no damage
        accepted += durable.read_sealed(path) not in (None, {"value": 1.25, "text": "grün", "list": [1, 2]})
    assert accepted == 0


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write_bytes(path, b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        durable.write(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_disk_full_names_path_and_bytes(tmp_path: Path) -> None:
    def full(temporary: Path) -> None:
        temporary.write_bytes(b"12345")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        HarnessError, match=r"disk full while writing .*weights.*: 5 bytes were written, [\d,]+ are free"
    ):
        durable.write(tmp_path / "weights", full)
    assert os.listdir(tmp_path) == []


def test_killed_writers_leave_whole_files(tmp_path: Path) -> None:
    """SIGKILL while states are being written in a loop: what the pointer names can always be read."""
    code = (
        "import sys, torch; from pathlib import Path; from harness import checkpoint\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    checkpoint.save_state(Path(sys.argv[1]), step, {'x': torch.full((200_000,), float(step)), 'step': step})\n"
        "    print(step, flush=True)\n"
    )
    for round_ in range(4):
        folder = tmp_path / str(round_)
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(round_).uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        state = checkpoint.load_state(folder)
        assert state is not None
        assert torch.equal(state["x"], torch.full((200_000,), float(state["step"])))


def flips(content: bytes, count: int, seed: int) -> list[bytes]:
    chosen = random.Random(seed).sample(range(8 * len(content)), count)
    out = []
    for bit in chosen:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        out.append(bytes(changed))
    return out


def test_300_of_300_flips_of_checkpoints_are_caught(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    checkpoint.save_state(tmp_path / "s", 7, {"module": net.state_dict(), "step": 7})
    checkpoint.save_encoder(tmp_path / "e", net.state_dict(), {"steps": 7})
    caught = 0
    for folder, pattern, load in (
        (tmp_path / "s", "*.pt", checkpoint.load_state),
        (tmp_path / "e", "*.safetensors", checkpoint.load_encoder),
        (tmp_path / "e", "*.json", checkpoint.load_encoder),
    ):
        file = next(folder.glob(pattern))
        content = file.read_bytes()
        for changed in flips(content, 100, 1):
            file.write_bytes(changed)
            try:
                loaded = load(folder)
                # a flip that turns one white space of the JSON pointer into another changes nothing that is read
                caught += file.suffix == ".json" and loaded is not None and loaded[1]["steps"] == 7
            except HarnessError as error:
                assert "\n" not in str(error)
                caught += 1
        file.write_bytes(content)
        assert load(folder) is not None
    assert caught == 300


def test_truncated_and_hostile_files_run_no_code(tmp_path: Path) -> None:
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/owned",)

    checkpoint.save_state(tmp_path / "s", 1, {"x": torch.zeros(10)})
    file = next((tmp_path / "s").glob("*.pt"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HarnessError, match="does not match its recorded SHA-256"):
        checkpoint.load_state(tmp_path / "s")
    file.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(HarnessError):
        checkpoint.load_state(tmp_path / "s")
    # even with a matching digest, weights_only refuses it
    durable.write_sealed(
        tmp_path / "s" / "latest.json", {"file": file.name, "sha256": durable.sha256_file(file), "step": 1}
    )
    with pytest.raises(HarnessError, match="never written here"):
        checkpoint.load_state(tmp_path / "s")
    assert not (tmp_path / "owned").exists()
