"""What the benchmarks share: candidates timed in turn, medians with their spread, one table or one JSON document.

Every ratio compares figures of one run: in each round every candidate is timed once, so that whatever else the machine
does meets all of them. On one pinned CPU core the clock counts CPU seconds of this process and of its ended children:
with one thread that is the wall time of an idle machine, and another job on the core does not move it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from harness.allocator import keep_freed_memory


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@dataclass
class Bench:
    """One run of one benchmark: its clock, device and the rows of its table."""

    name: str
    device: torch.device
    clock: Callable[[], float]
    rounds: int
    min_seconds: float
    as_json: bool
    began: float = field(default_factory=time.perf_counter)
    load_before: tuple[float, float, float] = field(default_factory=os.getloadavg)
    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def time(
        self,
        candidates: Mapping[str, Callable[[], Any]],
        warm: int = 1,
        before: Mapping[str, Callable[[], Any]] | None = None,
    ) -> dict[str, list[float]]:
        """Seconds per call of each candidate, `rounds` times, each round calling all of them in turn.

        before: what is done, not timed, before each turn of a candidate (taking what its workers have in stock)
        """
        repeats: dict[str, int] = {}
        for name, call in candidates.items():
            for _ in range(warm):
                call()
            repeats[name] = max(1, min(5000, round(self.min_seconds / max(self._once(call, 1), 1e-7))))
        out: dict[str, list[float]] = {name: [] for name in candidates}
        names = list(candidates)
        for number in range(self.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                if before is not None and name in before:
                    before[name]()
                out[name].append(self._once(candidates[name], repeats[name]))
        return out

    def _once(self, call: Callable[[], Any], repeats: int) -> float:
        synchronise(self.device)
        began = self.clock()
        for _ in range(repeats):
            call()
        synchronise(self.device)
        return (self.clock() - began) / repeats

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print one table now (unless --json); it is in the JSON document as well."""
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        if not self.as_json:
            print(laid_out(title, columns, rows), flush=True)

    def finish(self) -> None:
        """Print the conditions, or the whole document with --json."""
        conditions = machine(self.device) | {
            "clock": "CPU seconds" if self.clock is cpu_seconds else "wall seconds",
            "load_before": [round(v, 2) for v in self.load_before], "load_after": [round(v, 2) for v in os.getloadavg()],
            "rounds": self.rounds, "min_seconds": self.min_seconds,
            "took_seconds": round(time.perf_counter() - self.began, 1),
        }  # fmt: skip
        if self.as_json:
            print(json.dumps({"benchmark": self.name, "conditions": conditions, "tables": self.tables,
                              "figures": self.figures}, indent=1))  # fmt: skip
        else:
            print("\n" + conditions_line(conditions))


def laid_out(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as text."""
    cells = [list(columns)] + [[_shown(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [f"\n{title}"]
    for row in cells:
        padded = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(padded).rstrip())
    return "\n".join(lines)


def conditions_line(conditions: Mapping[str, Any]) -> str:
    """What the figures were measured under, in one line."""
    return "; ".join(f"{key} {value}" for key, value in conditions.items())


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Half the range as a share of the median."""
    return f"±{100 * (max(values) - min(values)) / 2 / max(median(values), 1e-12):.1f}%"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_model() -> str:
    """The processor's model name, as the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on; no host, user or path."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    return {
        "date": datetime.now(UTC).date().isoformat(), "device": name, "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": str(torch.__version__),
        "system": platform.system(),
    }  # fmt: skip


def options(
    name: str, doc: str, keep_memory: bool = True, device: str = "cpu", **extra: Mapping[str, Any]
) -> tuple[argparse.Namespace, Bench]:
    """Parse the flags every benchmark has and its own ones (`flag={...add_argument's words...}`).

    device: the one that is used where --device names none
    keep_memory: keep freed memory in the process as a run on a CPU does; peers timed beside it have the use of it too

    --core N pins this process and what it starts to one core with one thread and counts CPU seconds; -1, or a device
    other than the CPU, leaves it alone and counts wall seconds. Threads: --threads, only with --core -1.
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks/{name}.py", description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--device", default=device, help=f"cpu or cuda[:N] (default {device})")
    parser.add_argument("--core", type=int, default=0, help="CPU core to be pinned to; -1: none")
    parser.add_argument("--threads", type=int, default=None, help="of torch, with --core -1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min-seconds", type=float, default=0.3, help="per candidate and round, at least")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    for flag, words in extra.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", **words)
    chosen = parser.parse_args()
    place = torch.device(chosen.device)
    if place.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {chosen.device}: there is no CUDA device here")
    if keep_memory and place.type == "cpu":
        keep_freed_memory()
    if place.type == "cuda":
        torch.backends.cudnn.benchmark = True
    pinned = chosen.core >= 0 and place.type == "cpu"
    if pinned:
        os.sched_setaffinity(0, {chosen.core})
        torch.set_num_threads(1)
    elif chosen.threads:
        torch.set_num_threads(chosen.threads)
    clock = cpu_seconds if pinned else time.perf_counter
    return chosen, Bench(name, place, clock, chosen.rounds, chosen.min_seconds, chosen.json)
