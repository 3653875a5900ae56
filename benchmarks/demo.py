"""The main job from end to end: a checkpoint, its profile, the tuned plan for two ranks, and what all plans measure.

    python -m benchmarks.demo [--model DIR] [--small] [--output DIR]

Calls the same commands that a user would, and prints one table; report.json, the plans and traces stay in the output
folder. A second call goes on with the measurements that the first one left there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.demo_model import DEMO, SMALL, write_demo_model
from profiler.kernels.linear import Linear
from profiler.model import ModelShape, load_model_shape
from profiler.model.flops import prefill_flops
from service.http.serve_options import DEFAULT_PORT
from tuner.plan.layout import Pins, enumerate_layouts, layout_of
from tuner.plan.plan import Plan

WORLD_SIZE = 2
NEW_TOKENS = 4
ONE_RANK_S = 5.0
"""What the prompt may take on one rank at the rate of its products: the whole demo takes some forty times as long."""
QUIET_CORES = 0.3
"""Cores at work for others beyond which the demo says that the machine is busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSizes:
    """How much the demo runs."""

    longest_prompt: int
    budget_s: int
    repeat: int


FULL_SIZES = DemoSizes(longest_prompt=4096, budget_s=75, repeat=2)
SMALL_SIZES = DemoSizes(longest_prompt=1024, budget_s=30, repeat=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A plan of the table: its name and what `isochunk tune` is asked to keep fixed."""

    plan: str
    arguments: tuple[str, ...]


PLAIN = ("--virtual-stages", "1", "--sp-kind", "none")  # one group of layers a stage, no rows shared
BASELINES = (
    Baseline(plan="tuned", arguments=()),
    Baseline(plan="pp2-fixed:512", arguments=(*PLAIN, "--tp-size", "1", "--pp-size", "2", "--policy", "fixed:512")),
    Baseline(plan="pp2-gpipe", arguments=(*PLAIN, "--tp-size", "1", "--pp-size", "2", "--policy", "gpipe")),
    Baseline(plan="tp2", arguments=("--sp-kind", "none", "--tp-size", "2", "--pp-size", "1")),
    Baseline(plan="one-rank", arguments=("--world-size", "1")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan of report.json."""

    plan: str
    policy: str
    layout: str
    num_rounds: int
    predicted_s: float
    measured_s: float
    error: float
    ttft_s: float
    mfu: float | None
    tokens_equal: bool


def main() -> None:
    """Run the demo as the arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face checkpoint of your own")
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder of plans, traces and report")
    parser.add_argument("--small", action="store_true", help="a smaller model and prompt")
    options = parser.parse_args()
    sizes = SMALL_SIZES if options.small else FULL_SIZES
    options.output.mkdir(parents=True, exist_ok=True)
    model = options.model or options.output / ("model-small" if options.small else "model")
    if options.model is None and not (model / "config.json").exists():
        step("Writing a Llama checkpoint with random weights")
        write_demo_model(model, SMALL if options.small else DEMO)
    busy = others_at_work()
    rows = run_demo(model, sizes, options.output)
    report = options.output / "report.json"
    report.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    print_rows(rows)
    busy = max(busy, others_at_work())
    if busy > QUIET_CORES:
        print(
            f"This machine was busy: {busy:.1f} of its {os.cpu_count()} cores were at work for others. Times above are "
            "longer than on a quiet one, and predictions as far off as the load changed."
        )
    print(f"Plans, traces and report.json are in {options.output}")
    print(
        f"On a page: .venv/bin/isochunk serve --db {database_of(options.output)}, then the address that it prints "
        f"(http://127.0.0.1:{DEFAULT_PORT}/...)"
    )


def database_of(folder: Path) -> str:
    """The demo's database in its folder."""
    return f"sqlite:///{(folder / 'isochunk.db').resolve()}"


def others_at_work() -> float:
    """Cores that other processes keep busy, by the counters of /proc/stat over a second; none where it is not."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0

    def counters() -> tuple[int, int]:
        ticks = [int(word) for word in stat.read_text().splitlines()[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        return sum(ticks) - idle, sum(ticks)

    before_busy, before_all = counters()
    time.sleep(1.0)
    busy, total = counters()
    return (os.cpu_count() or 1) * (busy - before_busy) / max(1, total - before_all)


def run_demo(model: Path, sizes: DemoSizes, folder: Path) -> list[Row]:
    """Profile, then tune and run each plan of the table."""
    database = database_of(folder)
    shape = load_model_shape(str(model))
    longest = affordable_tokens(shape, min(sizes.longest_prompt, shape.max_positions - NEW_TOKENS))
    can_split = not any(layout.refusal for layout in enumerate_layouts(shape, WORLD_SIZE, Pins(tp_size=WORLD_SIZE)))
    tp_sizes = f"1,{WORLD_SIZE}" if can_split else "1"
    baselines = [one for one in BASELINES if can_split or one.plan != "tp2"]
    common = ["--db", database, "--threads-per-rank", "1", "--device", "cpu"]
    step(f"Profiling this machine with {WORLD_SIZE} ranks for prompts of {longest} tokens, about {sizes.budget_s} s")
    isochunk(
        "profile", str(model), "--world-size", str(WORLD_SIZE), "--tp-sizes", tp_sizes,
        "--context-length", str(longest), "--budget-s", str(sizes.budget_s), *common,
    )  # fmt: skip
    prompts = folder / "prompts.jsonl"
    write_prompts(prompts, shape.vocab_size, longest)
    rows = []
    for number, baseline in enumerate(baselines, 1):
        step(f"Plan {number} of {len(baselines)}: {baseline.plan}")
        plan = folder / f"{baseline.plan.replace(':', '-')}.json"
        # Without corrections, so that no plan of the table profits from the runs of the ones before.
        tuned = isochunk_json(
            "tune", str(model), "--prompt-lens", str(longest), "--no-correct",
            *(() if "--world-size" in baseline.arguments else ("--world-size", str(WORLD_SIZE))),
            *baseline.arguments, "--max-new-tokens", str(NEW_TOKENS), "-o", str(plan), *common,
        )["plan"]  # fmt: skip
        ran = isochunk_json(
            "run-plan", str(plan), "--weights", str(model), "--prompts", str(prompts), "--check",
            "--max-new-tokens", str(NEW_TOKENS), "--repeat", str(sizes.repeat),
            "--output", str(plan.with_suffix(".result.json")), "--trace", str(plan.with_suffix(".trace.json")), *common,
        )  # fmt: skip
        rows.append(make_row(baseline.plan, tuned, ran))
        print(f"  predicted {rows[-1].predicted_s:.3f} s, measured {rows[-1].measured_s:.3f} s", flush=True)
    return rows


def affordable_tokens(shape: ModelShape, most: int) -> int:
    """Tokens of the prompt, `most` or the first of its quarters that one rank runs in ONE_RANK_S at its products' rate.

    The smallest quarter where none is: a slow machine takes longer.
    """
    rate = product_flops()
    lengths = [most * quarters // 4 for quarters in (4, 3, 2, 1)]
    return next((one for one in lengths if prefill_flops(shape, [(one, 0)], 1) / rate <= ONE_RANK_S), lengths[-1])


def product_flops(size: int = 1024, samples: int = 5) -> float:
    """FLOP/s of one thread in a large product of this machine."""
    import torch

    torch.set_num_threads(1)
    x = torch.randn(size, size)
    linear = Linear(torch.randn(size, size))
    seconds = []
    for _ in range(1 + samples):
        started = time.perf_counter()
        linear(x)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / median(seconds[1:])


def make_row(name: str, plan: dict[str, Any], ran: dict[str, Any]) -> Row:
    """Join what was planned and what was measured."""
    predicted_s = plan["predicted"]["makespan_s"]
    return Row(
        plan=name,
        policy=plan["policy"],
        layout=str(layout_of(Plan.from_json(plan).parallel)),
        num_rounds=len(plan["rounds"]),
        predicted_s=predicted_s,
        measured_s=ran["makespan_s"],
        error=predicted_s / ran["makespan_s"] - 1.0,
        ttft_s=sum(request["ttft_s"] for request in ran["requests"]) / len(ran["requests"]),
        mfu=ran["mfu"] if ran["mfu"] is not None else ran["mfu_of_ceiling"],
        tokens_equal=all(request["tokens_equal"] for request in ran["requests"]),
    )


def write_prompts(path: Path, vocab_size: int, num_tokens: int) -> None:
    """Random token ids, the same for every plan."""
    choose = random.Random(0)
    token_ids = [choose.randrange(vocab_size) for _ in range(num_tokens)]
    path.write_text(json.dumps({"id": "r0", "token_ids": token_ids}) + "\n")


def isochunk(*arguments: str) -> None:
    """Run a command and let it print; a profile that has nothing new to measure says so with exit code 3."""
    done = subprocess.run([sys.executable, "-m", "service", *arguments], check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"isochunk {' '.join(arguments)} failed with exit code {done.returncode}")


def isochunk_json(*arguments: str) -> dict[str, Any]:
    """Run a command and return its JSON; exit code 1 of --check is an answer, not a failure."""
    done = subprocess.run([sys.executable, "-m", "service", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise SystemExit(f"isochunk {' '.join(arguments)} failed with exit code {done.returncode}")
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def step(text: str) -> None:
    """Say what begins."""
    print(f"== {text}", flush=True)


def print_rows(rows: list[Row]) -> None:
    """Print the demo's table."""
    from service.cli.output import print_table

    print_table(
        ["plan", "policy", "layout", "rounds", "predicted s", "measured s", "error %", "TTFT s", "MFU %", "equal"],
        [
            [
                row.plan, row.policy, row.layout, row.num_rounds, row.predicted_s, row.measured_s,
                100 * row.error, row.ttft_s, None if row.mfu is None else 100 * row.mfu, row.tokens_equal,
            ]
            for row in rows
        ],
        title="Plans on this machine: MFU of the fastest matmul measured on it; equal: same tokens as Transformers",
    )  # fmt: skip


if __name__ == "__main__":
    main()
