"""Every precision on one card beside bfloat16: its kernels checked and timed, fused and not, and a whole model.

    python -m benchmarks.gpu_precisions --output FILE [--only products ...] [--arms w8a8 ...] [--device cpu]

Shapes are those of Llama-3-8B, weights random. Each part runs in a process of its own and hands on its rows as they
come: a kernel that fails takes no others with it. `--device cpu` is a dry run on a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.demo_model import SMALL, write_demo_model
from benchmarks.precision_arms import Sizes
from benchmarks.precision_checks import ROOT, check_kernels
from benchmarks.precision_runs import ROW, UNFUSED, run_case
from benchmarks.precision_times import time_products, time_quantizing
from db.files.documents import write_json
from profiler.model import load_model_shape
from service.cli.output import print_table

ARMS = (
    "bfloat16", "w8a16", "w8a8", "w8a8-static", "fp8", "fp8-static", "fp8+kv-fp8", "w8a8+kv-int8",
    "w8a8" + UNFUSED, "fp8" + UNFUSED,
)  # fmt: skip
LIMIT_S = 420.0  # of a part


PARTS: dict[str, Callable[[Sizes, str], None]] = {
    "products": time_products,
    "chains": time_products,
    "quantizing": time_quantizing,
}


def run_part(name: str, arms: Sequence[str], device: torch.device) -> None:
    """One part, in this process."""
    sizes = Sizes(device)
    if name == "checks":
        check_kernels(sizes)
    elif name in PARTS:
        PARTS[name](sizes, name)
    elif device.type == "cuda":
        run_case(sizes.cases[name], arms, load_model_shape("llama-3-8b"), device.type)
    else:
        with TemporaryDirectory() as folder:
            write_demo_model(Path(folder), SMALL)
            run_case(sizes.cases[name], arms, load_model_shape(folder), device.type)


def collect(name: str, arms: Sequence[str], device: str) -> Iterator[dict[str, object]]:
    """The rows of a part as they come, of a process of its own; the last one says how it ended."""
    started = time.monotonic()
    command = [
        sys.executable,
        "-u",
        "-m",
        "benchmarks.gpu_precisions",
        "--part",
        name,
        "--device",
        device,
        "--arms",
        *arms,
    ]
    # What one part has tuned, the next one takes.
    env = os.environ | {"TRITON_CACHE_AUTOTUNING": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    assert process.stdout is not None
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(_end_late, process, LIMIT_S)
        for line in process.stdout:
            if line.startswith(ROW):
                yield json.loads(line.removeprefix(ROW))
        code = waited.result()
    yield {"part": "end", "of": name, "exit_code": code, "seconds": time.monotonic() - started}


def _end_late(process: subprocess.Popen[str], limit_s: float) -> int:
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        return process.wait(30.0)


def print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    """A table for each kind of row."""
    for part in dict.fromkeys(row["part"] for row in rows):
        if part == "kernels":
            continue
        of_part = [row for row in rows if row["part"] == part]
        columns = [name for name in dict.fromkeys(key for row in of_part for key in row) if name != "part"]
        print_table(columns, [tuple(row.get(column) for column in columns) for row in of_part], title=str(part))


def main() -> None:
    """Run the parts one after another, keep their rows as they come, print tables."""
    every = ["checks", "quantizing", "prefill-8192", "decode", "prefill-32768", "products", "chains"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=every, choices=every)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="of a whole model")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", choices=every, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.part:
        run_part(options.part, options.arms, device)
        return
    about = {"torch": torch.__version__, "device": options.device}
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
    rows: list[dict[str, object]] = []
    known = [name for name in options.only if name in Sizes(device).cases or not name.startswith(("pre", "dec"))]
    for name in known:
        before = len(rows)
        for row in collect(name, options.arms, options.device):
            rows.append(row)
            if options.output:
                write_json(options.output, about | {"rows": rows})
        print_rows(rows[before:])


if __name__ == "__main__":
    main()
