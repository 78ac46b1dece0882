"""What tracking costs a training step: none, the workspace's own store, and a server that refuses, freezes or fails.

    python benchmarks/tracking.py [--seconds 12] [--rounds 3] [--threads 1] [--json]

Every measurement is a fresh process and a fresh workspace, so that the import of MLflow and the first use of its store
(60 migrations) fall into it; the kinds take turns, so that whatever else the machine does meets all of them. A step is
forward, backward and SGD of `convnet_small` on 64 images of 28 x 28; every tenth step writes to the journal, as the
runner does. Times are milliseconds; `close` is the seconds that `Tracking.close` took at the end: at most 30 for the
workspace's own store, as after a run; 4 for a server that is away, as after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KINDS = ("none", "own store", "refused", "frozen", "failing")
BATCH, SIDE, LOG_EVERY, WARM_STEPS = 64, 28, 10, 5
CLOSE_SECONDS = {"none": 30.0, "own": 30.0}  # every other: 4


def measure(uri: str, seconds: float, threads: int) -> dict[str, Any]:
    """Train for `seconds` under one tracker ("own" is the workspace's own store); times in milliseconds."""
    import torch
    from torch import nn

    from harness.mirror import Tracking

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip
    images, labels = torch.randn(BATCH, 1, SIDE, SIDE), torch.randint(10, (BATCH,))
    net(images)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracking(Path(folder), None if uri == "own" else uri)
        tracker.start()
        journal = tracker.open("bench", name="bench", params={"lr": "0.01"}, tags={}, config={}, environment={})
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimiser.step()
            if len(times) % LOG_EVERY == 0:
                journal.metrics(len(times), {"loss": loss.item()})
            times.append(1000 * (time.perf_counter() - started))
        journal.end("FINISHED")
        started = time.perf_counter()
        owed = tracker.close(CLOSE_SECONDS.get(uri, 4.0))
        return {"times": times[WARM_STEPS:], "close": time.perf_counter() - started, "owed": sum(owed.runs.values())}


class _Failing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        return


@contextlib.contextmanager
def servers() -> Iterator[dict[str, str]]:
    """The address of each kind; a frozen server takes connections and never says a word."""
    failing = ThreadingHTTPServer(("127.0.0.1", 0), _Failing)
    threading.Thread(target=failing.serve_forever, daemon=True).start()
    with socket.socket() as refused, socket.socket() as frozen:
        refused.bind(("127.0.0.1", 0))  # bound, so that nobody else takes the port, and never listening
        frozen.bind(("127.0.0.1", 0))
        frozen.listen(128)
        ports = (refused.getsockname()[1], frozen.getsockname()[1], failing.server_port)
        yield dict(zip(KINDS, ("none", "own", *(f"http://127.0.0.1:{port}" for port in ports)), strict=True))
    failing.shutdown()
    failing.server_close()


def collect(seconds: float, rounds: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """`rounds` measurements of every kind, each in a process of its own; the order turns by one from round to round."""
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with servers() as addresses:
        for number in range(rounds):
            turn = number % len(KINDS)
            for kind in KINDS[turn:] + KINDS[:turn]:
                command = [sys.executable, __file__, "--measure", addresses[kind], "--seconds", str(seconds)]
                reply = subprocess.run([*command, "--threads", str(threads)], stdout=subprocess.PIPE, check=True)
                results[kind].append(json.loads(reply.stdout))
    return results


def summarise(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One record per kind: median and 90th percentile over all steps, their ratios to `none`, the spread of rounds."""
    records: list[dict[str, Any]] = []
    for kind, measured in results.items():
        times = [value for each in measured for value in each["times"]]
        rounds = [statistics.median(each["times"]) for each in measured]
        records.append({
            "tracking": kind, "steps": len(times), "median_ms": statistics.median(times),
            "p90_ms": statistics.quantiles(times, n=10)[-1], "round_medians_ms": rounds,
            "close_seconds": statistics.median(each["close"] for each in measured),
            "owed_records": [each["owed"] for each in measured],
        })  # fmt: skip
    for record in records:
        for key in ("median", "p90"):
            record[f"{key}_ratio"] = record[f"{key}_ms"] / records[0][f"{key}_ms"]
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    """The records as one table of fixed width."""
    print(
        f"{'tracking':<10}{'steps':>7}{'median':>9}{'ratio':>7}{'p90':>9}{'ratio':>7}{'close':>7}  medians of the rounds"
    )
    for r in records:
        rounds = " ".join(f"{value:.1f}" for value in r["round_medians_ms"])
        print(f"{r['tracking']:<10}{r['steps']:>7}{r['median_ms']:>9.1f}{r['median_ratio']:>7.2f}{r['p90_ms']:>9.1f}"
              f"{r['p90_ratio']:>7.2f}{r['close_seconds']:>7.1f}  {rounds}")  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="of training per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    parser.add_argument("--measure", metavar="URI", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.seconds, options.threads)))
        return
    load = os.getloadavg()
    records = summarise(collect(options.seconds, options.rounds, options.threads))
    machine = {"cpus": os.cpu_count(), "system": platform.system(), "load_before": load, "load_after": os.getloadavg()}
    settings = {"seconds": options.seconds, "rounds": options.rounds, "threads": options.threads}
    if options.json:
        print(json.dumps({"machine": machine, "settings": settings, "kinds": records}))
        return
    print_table(records)
    print(f"{machine['cpus']} CPUs, {options.threads} threads, load average {load[0]:.1f} before and "
          f"{machine['load_after'][0]:.1f} after")  # fmt: skip


if __name__ == "__main__":
    main()
