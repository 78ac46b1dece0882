"""Batches: the same order, seeds and pixels wherever the images lie; nothing is read further ahead than promised."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from harness import batches, mapped, pretrain
from harness.augment import hash_seeds, permutation, uniform
from harness.batches import Batches, MixedBatches, Placement, choose_placement, num_labelled, place
from harness.contracts import Batch
from harness.optim import OptimConfig, ScheduleConfig
from harness.read_ahead import AHEAD, read_ahead

CPU = torch.device("cpu")
COUNT, PLACEMENTS = 50, ("resident", "pinned", "streamed", None)


@pytest.fixture
def images() -> Tensor:
    pixels = torch.randint(0, 256, (COUNT, 6, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels.permute(0, 3, 1, 2)


@pytest.fixture
def on_file(images: Tensor, tmp_path: Path) -> Tensor:
    path = tmp_path / "images.pixels"
    path.write_bytes(images.permute(0, 2, 3, 1).numpy().tobytes())
    return mapped.open_pixels(path, (COUNT, 6, 5, 3)).permute(0, 3, 1, 2)


LABELS = torch.arange(COUNT) % 7


def make(images: Tensor, placement: Placement | None, batch_size: int = 8, seed: int = 4) -> Batches:
    return Batches(images, LABELS, batch_size=batch_size, seed=seed, device=CPU, placement=placement)


def same(a: Batch, b: Batch) -> None:
    assert a.labels is not None and b.labels is not None
    for one, other in ((a.images, b.images), (a.labels, b.labels), (a.indices, b.indices), (a.seeds, b.seeds)):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert b.images.is_contiguous(memory_format=torch.channels_last)


def by_hand(images: Tensor, step: int, batch_size: int, seed: int = 4) -> Batch:
    epoch, position = divmod(step, COUNT // batch_size)
    indices = permutation(seed, epoch, COUNT)[position * batch_size : (position + 1) * batch_size]
    return Batch(images[indices], LABELS[indices], indices, hash_seeds(seed, epoch, indices))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("batch_size", [1, 8, 25, 50])
def test_two_epochs_are_the_same_everywhere(
    images: Tensor, on_file: Tensor, placement: Placement | None, batch_size: int
) -> None:
    for source in (images, on_file):
        data = make(source, placement, batch_size)
        for step in range(2 * data.steps_per_epoch + 1):
            same(by_hand(images, step, batch_size), data.at(step))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_steps_may_be_asked_for_in_any_order(images: Tensor, on_file: Tensor, placement: Placement | None) -> None:
    data = make(on_file, placement)
    for step in (17, 18, 3, 4, 4, 5, 0, 11, 12, 6):  # resumed, gone back, repeated, over the end of an epoch
        same(by_hand(images, step, 8), data.at(step))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_passes_in_order(images: Tensor, on_file: Tensor, placement: Placement | None) -> None:
    data = make(on_file, placement, batch_size=7)
    data.at(0)
    found = list(data.batches())
    assert [len(batch) for batch in found] == [7] * 7, "the last batch of one image is left out"
    assert torch.equal(torch.cat([batch.indices for batch in found]), torch.arange(49))
    assert torch.equal(torch.cat([batch.images for batch in found]), images[:49])
    spread = torch.cat([batch.indices for batch in data.batches(10)])
    assert spread.tolist() == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    mean = data.embed(lambda part: part.float().mean((1, 2, 3)), 10)
    assert torch.equal(mean, images[spread].float().mean((1, 2, 3)))
    indices = torch.tensor([49, 0, 3])
    same(Batch(images[indices], LABELS[indices], indices, hash_seeds(4, 6, indices)), data.gather(indices, 6))
    same(by_hand(images, 1, 7), data.at(1))  # undisturbed by all this


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_an_index_outside_is_refused(images: Tensor, placement: Placement) -> None:
    for index in (COUNT, -1):
        with pytest.raises(IndexError):
            make(images, placement).gather(torch.tensor([0, index]), 0)


class Toy(nn.Module):
    """Views, batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(48, 3))

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        noise = uniform(batch.seeds, "noise", (3, 6, 5))
        assert batch.labels is not None
        return {"loss": nn.functional.cross_entropy(self.net(batch.images / 255 + noise), batch.labels % 3)}


def test_weights_are_the_same_after_a_kill_in_streamed_training(
    images: Tensor, on_file: Tensor, tmp_path: Path
) -> None:
    plan = pretrain.Plan(30, 4, OptimConfig(lr=0.05), ScheduleConfig(), bf16=False, checkpoint_seconds=0.0)
    straight, resumed = Toy(), Toy()
    pretrain.train(straight, make(images, "resident"), plan, None, lambda *_: None)

    def stop(step: int, means: dict[str, float], executed: int) -> None:
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.train(Toy(), make(on_file, "streamed"), plan, tmp_path / "state", stop)
    done = pretrain.train(resumed, make(on_file, None), plan, tmp_path / "state", lambda *_: None)
    assert 0 < done.executed < 30
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# ------------------------------------------------------------------------------------------------------- placement


def test_placement_is_chosen_and_announced(images: Tensor, on_file: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(images, None).placement == "resident" and make(on_file, None).placement == "streamed"
    assert make(images, "streamed").placement == "streamed"
    cuda, size = torch.device("cuda"), images.numel()
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    for free, expected in ((2 * size - 100, ("resident", "resident")), (2 * size - 102, ("pinned", "streamed"))):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * size))
        assert (choose_placement(images, cuda), choose_placement(on_file, cuda)) == expected
    assert place(images, cuda) is images, "what does not fit stays where it is"


def test_resident_and_pinned_start_no_thread_on_a_cpu(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "read_ahead", None)
    for placement in ("resident", "pinned"):
        data = make(images, placement)  # type: ignore[arg-type]
        data.at(0)
        assert data.images.data_ptr() == images.data_ptr(), "no copy"


def test_no_more_is_read_ahead_than_promised(images: Tensor) -> None:
    drawn: list[int] = []

    def indices() -> Iterator[Tensor]:
        for number in range(20):
            drawn.append(number)
            yield torch.tensor([number])

    for number, (places, rows) in enumerate(read_ahead(images, indices(), CPU)):
        assert places.tolist() == [number] and torch.equal(rows, images[number : number + 1])
        assert len(drawn) == min(number + 1 + AHEAD, 20)


def test_threads_end_with_their_batches(images: Tensor) -> None:
    def readers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]

    gc.collect()
    data = make(images, "streamed")
    data.at(0)
    assert readers()
    del data
    gc.collect()
    end = time.monotonic() + 20
    while readers() and time.monotonic() < end:
        time.sleep(0.01)
    assert not readers()


# ----------------------------------------------------------------------------------------- images larger than memory


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "available_bytes", lambda: 1000)


@pytest.mark.parametrize("step_bytes", [1, 300, 1 << 20])
def test_selections_of_mapped_images_are_mapped(
    images: Tensor, on_file: Tensor, little_memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_bytes: int
) -> None:  # fmt: skip
    monkeypatch.setattr(mapped, "CHUNK_BYTES", step_bytes)
    rows = torch.tensor([7, 3, 3, 49, 0, 20])
    few, some = mapped.select(on_file, rows[:2]), mapped.select(on_file, rows)
    assert not mapped.is_mapped(few) and torch.equal(few, images[rows[:2]])
    assert mapped.is_mapped(some) and torch.equal(some, images[rows])
    assert mapped.select(on_file, torch.arange(COUNT)) is on_file
    again = mapped.select(some, torch.tensor([5, 1, 2, 3, 0, 4]))
    assert mapped.is_mapped(again) and torch.equal(again, images[rows][[5, 1, 2, 3, 0, 4]])
    in_memory = mapped.select(images, rows)
    assert not mapped.is_mapped(in_memory) and torch.equal(in_memory, images[rows])
    for tensor in (few, some, again, in_memory):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert [path.name for path in tmp_path.iterdir()] == ["images.pixels"], "nothing that a kill could leave behind"
    assert torch.equal(on_file, images)


def test_joining(images: Tensor, on_file: Tensor, little_memory: None) -> None:
    for source in (images, on_file):
        whole = mapped.join([source[:20], source[20:21], source[21:]])
        assert whole.data_ptr() == source.data_ptr() and torch.equal(whole, images), "neighbours: no copy"
        assert mapped.join([source[5:9]]).data_ptr() == source[5:9].data_ptr()
        turned = mapped.join([source[20:], source[:20]])
        assert torch.equal(turned, torch.cat([images[20:], images[:20]]))
        gap = mapped.join([source[:20], source[21:]])
        assert torch.equal(gap, torch.cat([images[:20], images[21:]]))
        assert mapped.is_mapped(turned) == mapped.is_mapped(gap) == (source is on_file)
        assert gap.is_contiguous(memory_format=torch.channels_last)


def test_a_control_group_bounds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    true_read = Path.read_text
    for text, bound in (("4096\n", 4096), ("max\n", None)):
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda self, *a, t=text, **k: t if self.name == "memory.max" else true_read(self, *a, **k),
        )
        assert mapped.available_bytes() == bound if bound else mapped.available_bytes() > 4096
    assert mapped.fits_in_memory(1) and not mapped.fits_in_memory(1 << 60)


# ------------------------------------------------------------------------------------------------------------- CUDA


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
def test_placements_are_bitwise_equal_on_cuda(on_file: Tensor, cuda: torch.device) -> None:
    large = torch.randint(0, 256, (5000, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.arange(5000)
    resident, pinned = (
        Batches(large, labels, batch_size=256, seed=1, device=cuda, placement=where)  # type: ignore[arg-type]
        for where in ("resident", "pinned")
    )
    assert resident.images.is_cuda and not pinned.images.is_cuda
    weight = torch.randn(2048, 2048, device=cuda)
    kept = []
    for step in (*range(45), 7, 8, 9):
        expected, found = resident.at(step), pinned.at(step)
        for _ in range(3):  # work on the consumer's stream, so that copies and reuse of memory really overlap
            weight = (weight @ weight).clamp(-1, 1)
        kept.append((expected, found))
        del found
    for expected, found in kept:
        same(expected, found)
    for a, b in zip(resident.batches(), pinned.batches(), strict=True):
        same(a, b)
    streamed = Batches(on_file, LABELS, batch_size=8, seed=4, device=cuda, placement="streamed")
    for step in range(13):
        batch = streamed.at(step)
        same(by_hand(on_file, step, 8), Batch(*(t.cpu() for t in vars(batch).values())))


@pytest.mark.gpu
def test_a_resident_step_never_waits_for_the_device(images: Tensor, cuda: torch.device) -> None:
    data = Batches(images, LABELS, batch_size=8, seed=4, device=cuda, placement="resident")
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(15):
            data.at(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------ labelled among unlabelled ones

LABELLED = torch.tensor([40, 3, 22, 31, 8, 17, 49])  # of the same images; labels are their numbers


def mixed(images: Tensor, batch_size: int = 10, count: int = len(LABELLED)) -> MixedBatches:
    chosen = LABELLED[:count]
    return MixedBatches(images, images[chosen], chosen, batch_size=batch_size, seed=4, device=CPU)


@pytest.mark.parametrize(
    ("batch_size", "count", "labelled"), [(10, 7, 5), (20, 7, 7), (11, 3, 3), (3, 7, 1), (2, 1, 1)]
)
def test_a_mixed_batch_by_hand(images: Tensor, batch_size: int, count: int, labelled: int) -> None:
    data, unlabelled = mixed(images, batch_size, count), batch_size - labelled
    assert num_labelled(batch_size, count) == labelled and data.steps_per_epoch == COUNT // unlabelled
    for step in range(2 * data.steps_per_epoch + 1):
        batch = data.at(step)
        assert batch.labels is not None and len(batch) == len(batch.labels) == batch_size
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        has = batch.labels >= 0
        expected = by_hand(images, step, unlabelled)
        assert torch.equal(batch.images[~has], expected.images) and torch.equal(batch.seeds[~has], expected.seeds)
        assert torch.equal(batch.indices[~has], expected.indices) and (batch.labels[~has] == -1).all()
        epoch, place = divmod(step, count // labelled)
        positions = permutation(4, epoch, count)[place * labelled : (place + 1) * labelled]
        assert torch.equal(batch.labels[has], LABELLED[positions])
        assert torch.equal(batch.images[has], images[LABELLED[positions]])
        assert torch.equal(batch.indices[has], COUNT + positions)
        assert torch.equal(batch.seeds[has], hash_seeds(4, epoch, COUNT + positions))
        assert len(batch.seeds.unique()) == batch_size


@pytest.mark.parametrize("batch_size", range(2, 40))
def test_labelled_images_are_spread_evenly(images: Tensor, batch_size: int) -> None:
    for count in range(1, len(LABELLED) + 1):
        labels = mixed(images, batch_size, count).at(0).labels
        assert labels is not None
        shown = int((labels >= 0).sum())
        for parts in range(1, max(1, shown // 2) + 1):
            assert all((part >= 0).any() for part in labels.tensor_split(parts))


def test_mixed_batches_from_a_file_in_any_order(images: Tensor, on_file: Tensor) -> None:
    from_memory, from_file = mixed(images), mixed(on_file)
    assert from_file.placement == "streamed"
    for step in (0, 1, 2, 17, 3, 3, 11):
        same(from_memory.at(step), from_file.at(step))
    from_file.close()
    same(from_memory.at(5), from_file.at(5))


def test_passes_over_mixed_data_are_over_the_unlabelled(images: Tensor) -> None:
    data = mixed(images)
    found = list(data.batches())
    assert len(data) == COUNT and torch.equal(torch.cat([batch.indices for batch in found]), torch.arange(COUNT))
    assert all(batch.labels is None for batch in found)
