"""Clients that read and plan at once: `python -m benchmarks.service_load [--clients 50] [--planners 10]`.

Serves the profile of two H100 that lies in `benchmarks/results`. Each client is a thread that waits up to a second, as
a person would, and calls: a few search plans for batches of their own, one after the other, so that the service always
plans as much as it can, and the others read lists. Prints how many calls came to what, and the quantiles of their
times, beside the share of the processor that was idle before: on a busy machine the figures say little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

from benchmarks.page_picture import served
from service.cli.output import print_table

READS = ("hardware", "measurements", "measurements?hardware=1&op=matmul", "plans", "runs", "fits", "models", "workers",
         "jobs", "session")  # fmt: skip
_PATIENCE_S = 240.0


def main(clients: int, planners: int, seconds: float) -> None:
    """Serve, call, print."""
    idle = _idle_share()
    with served() as (address, token):
        calls = _call(address, token, clients, planners, seconds)
    rows: list[tuple[object, ...]] = []
    for kind, times in sorted(calls.items()):
        ordered = sorted(times)
        rows.append(
            (kind, len(ordered), *(round(1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))])
                                   for q in (0.5, 0.9, 0.99, 1.0)))
        )  # fmt: skip
    title = f"{clients} clients of whom {planners} plan, {seconds:g} s, {os.cpu_count()} cores, {idle:.0%} idle before"
    print_table(("call", "count", "p50 ms", "p90 ms", "p99 ms", "slowest ms"), rows, title=title)


def _call(base: str, token: str, clients: int, planners: int, seconds: float) -> dict[str, list[float]]:
    calls: dict[str, list[float]] = defaultdict(list)
    end = time.monotonic() + seconds

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            time.sleep(draw.random())
            body = None
            path = draw.choice(READS)
            if seed < planners:
                lengths = ",".join(str(draw.randrange(500, 30_000)) for _ in range(draw.randint(1, 4)))
                options = {"model": "llama-3-8b", "hardware_id": 1, "world_size": 2, "keep": False}
                path, body = "plans", json.dumps(options | {"prompt_lens": lengths}).encode()
            headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
            began = time.perf_counter()
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(f"{base}/api/v1/{path}", body, headers), timeout=_PATIENCE_S
                ) as answer:
                    answer.read()
                kind = "plan" if body else "read"
            except urllib.error.HTTPError as error:
                kind = f"{'plan' if body else 'read'} {error.code}"
            except OSError as error:
                kind = f"error {error}"
            calls[kind].append(time.perf_counter() - began)

    threads = [threading.Thread(target=client, args=(seed,), daemon=True) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + _PATIENCE_S + 10)
    return calls


def _idle_share(over_s: float = 3.0) -> float:
    """Of all cores, over a few seconds."""

    def read() -> tuple[int, int]:
        numbers = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]

    total, idle = read()
    time.sleep(over_s)
    later, later_idle = read()
    return (later_idle - idle) / max(1, later - total)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--planners", type=int, default=10, help="Of them; the others read.")
    parser.add_argument("--seconds", type=float, default=300.0)
    given = parser.parse_args()
    main(given.clients, given.planners, given.seconds)
