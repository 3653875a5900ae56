"""Models through Transformers on cards: plans never run before, predicted and measured, and their layers' time.

    python -m benchmarks.gpu_library CONFIG.json [--world-size N] [--budget-s S] [--context-length N] [--layers N]
        [--own] [--output FOLDER] [--device cpu]

CONFIG.json is a published configuration; weights are random, in bfloat16. It is profiled as whole layers, planned for
prompts of several lengths by several policies, and each plan is run once. `--layers` keeps the
first layers alone, where all of them do not fit. `--output` keeps the rows, and each plan with its result as soon as
the plans of its lengths ran. `--own` profiles the model with kernels here as well, and prints both
ways side by side. With experts, the rate of their grouped products is printed beside that of one large product.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from db.rows.archive import export_hardware
from db.rows.hardware import save_hardware
from db.rows.measurements import load_measurements
from db.store.engine import open_database
from profiler.hardware.device import describe_hardware
from profiler.measure.profile import ProfileOptions, profile_model
from profiler.model import ModelShape, WholeLayer, load_model_shape
from profiler.points.point import BEFORE_LAYERS, Op
from runtime.run.result import RunResult
from runtime.run.run import run_plans
from service.cli.output import print_table
from service.use_cases.tune import tune
from service.use_cases.tune_options import TuneOptions
from tuner.plan.layout import layout_of
from tuner.plan.plan import Plan

LENGTHS = {"cuda": ("4096", "12000", "30000", "8192,8192", "3000,20000"), "cpu": ("300", "200,100")}
POLICIES = {"cuda": ("fixed:1024", "fixed:4096", "joint"), "cpu": ("fixed:64", "joint")}
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
_TOKENS = (256, 1024, 4096, 16384)
_REPEATS = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile, plan, run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=200.0)
    parser.add_argument("--context-length", type=int, default=32768)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--own", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / options.config.name.removesuffix(".config.json")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(plain(json.loads(options.config.read_text()), options.layers)))
        db_url = f"sqlite:///{scratch}/rows.db"
        shape = load_model_shape(str(folder), backend="transformers")
        print(f"{shape.name}: {shape.num_layers} layers, {shape.num_text_parameters / 1e9:.1f} billion parameters")
        experts_rate(shape, options.device)
        for backend in ("transformers", "own") if options.own else ("transformers",):
            profile(folder, db_url, options, backend)
        layer_table(db_url, options)
        plan_table(folder, db_url, options, shape)


def plain(config: dict[str, object], layers: int | None) -> dict[str, object]:
    """The configuration without its quantization, cut to so many layers."""
    config.pop("quantization_config", None)
    if layers is not None:
        config["num_hidden_layers"] = layers
        if isinstance(types := config.get("layer_types"), list):
            config["layer_types"] = types[:layers]
    return config | {"dtype": "bfloat16"}


def profile(folder: Path, db_url: str, options: argparse.Namespace, backend: str) -> None:
    """Measure what the budget holds."""
    summary = profile_model(
        ProfileOptions(
            model=str(folder), backend=backend, world_size=options.world_size, context_length=options.context_length,
            dtype=DTYPES[options.device], device_type=options.device, budget_s=options.budget_s,
            db_url=db_url, threads_per_rank=1,
        )
    )  # fmt: skip
    print(f"{backend}: {summary.num_new} points in {summary.elapsed_s:.0f} s, {summary.num_missing} missing")


def layer_table(db_url: str, options: argparse.Namespace) -> None:
    """Microseconds of whole layers, by kind, chunk and context; all rows go to the output."""
    with open_database(db_url) as database:
        hardware = describe_hardware(options.device, num_threads=1)
        found = load_measurements(database, hardware)
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            name = options.config.name.removesuffix(".config.json")
            export_hardware(database, save_hardware(database, hardware), options.output / f"{name}.profile.json.gz")
    rows = [
        (row.variant or "own", row.shape["chunk"], row.shape["context"], row.median_us)
        for row in found
        if row.op == Op.LAYER and row.shape["chunk"] >= _TOKENS[0]
    ]
    rows.sort(key=lambda row: (row[0] != BEFORE_LAYERS, *row))
    print_table(("layer", "chunk", "context", "us"), rows, title="Whole layers")


def plan_table(folder: Path, db_url: str, options: argparse.Namespace, shape: ModelShape) -> None:
    """Plans of every length and policy, predicted and measured."""
    cases = [(lengths, policy) for lengths in LENGTHS[options.device] for policy in POLICIES[options.device]]
    plans = [
        tune(
            TuneOptions(
                model=str(folder), backend="transformers", world_size=options.world_size, prompt_lens=lengths,
                policy=policy, dtype=DTYPES[options.device], device_type=options.device, db_url=db_url, keep=False,
                correct=False, threads_per_rank=1,
            )
        ).plan
        for lengths, policy in cases
    ]  # fmt: skip
    results = dict[int, RunResult]()
    # A tuned plan may leave ranks idle. In two launches, so that half of the results are there early.
    halves = (LENGTHS[options.device][:3], LENGTHS[options.device][3:])
    launches = [(size, half) for size in sorted({plan.parallel.world_size for plan in plans}) for half in halves]
    for size, half in launches:
        alike = [at for at, plan in enumerate(plans) if plan.parallel.world_size == size and cases[at][0] in half]
        if not alike:
            continue
        found = run_plans(
            [plans[index] for index in alike], random_weights=True, device_type=options.device, db_url=db_url,
            num_threads=1, repeat=1,
        )  # fmt: skip
        results |= dict(zip(alike, found, strict=True))
        for index in alike:
            keep_result(options, cases[index], plans[index], results[index])
    rows, errors = list[tuple[object, ...]](), list[float]()
    measured: dict[str, dict[str, float]] = {}
    for index, ((lengths, policy), plan) in enumerate(zip(cases, plans, strict=True)):
        result = results[index]
        assert plan.predicted is not None
        predicted_s = plan.predicted.makespan_s
        errors.append(predicted_s / result.makespan_s - 1.0)
        measured.setdefault(lengths, {})[policy] = result.makespan_s
        mfu = None if result.mfu is None else 100 * result.mfu
        layout = str(layout_of(plan.parallel))
        row = (layout, len(plan.rounds), predicted_s, result.makespan_s, 100 * errors[-1], mfu)
        rows.append((lengths, policy, *row))
    for lengths, times in measured.items():
        lost = 100 * (times["joint"] / min(times.values()) - 1.0)
        rows.append((lengths, "joint against the best", None, None, None, None, lost, None))
    columns = ("prompts", "policy", "layout", "rounds", "predicted s", "measured s", "error %", "MFU %")
    print_table(columns, rows, title=f"{shape.name} on {options.world_size} ranks")
    sizes = sorted(map(abs, errors))
    print(
        f"Median error {100 * median(sizes):.1f} %, worst {100 * sizes[-1]:.1f} %, {len(sizes)} plans never run before"
    )


def keep_result(options: argparse.Namespace, case: tuple[str, str], plan: Plan, result: RunResult) -> None:
    """A line of the output's results, and of what is printed."""
    assert plan.predicted is not None
    print(f"{case[0]} {case[1]}: {plan.predicted.makespan_s:.4f} s predicted, {result.makespan_s:.4f} s", flush=True)
    if options.output is None:
        return
    document = {"config": options.config.name, "case": case, "plan": plan.to_json(), "result": result.to_json()}
    with (options.output / "results.jsonl").open("a") as file:
        file.write(json.dumps(document) + "\n")


def experts_rate(shape: ModelShape, device_type: str) -> None:
    """TFLOP/s of grouped products over the experts of a layer, each with as many tokens, and of one product."""
    layer = next((one for one in shape.every_kind if isinstance(one, WholeLayer) and one.experts), None)
    if layer is None or layer.experts is None or device_type != "cuda":
        return
    experts = layer.experts
    sizes = [size for name, size in layer.tensors if len(size) == 3 and name.endswith("gate_up_proj")]
    if not sizes:
        return
    count, first, second = sizes[0]
    n, k = (second, first) if first == shape.hidden_size else (first, second)
    weight = torch.randn(count, n, k, device=device_type, dtype=torch.bfloat16)
    rows = []
    for tokens in _TOKENS:
        routed = tokens * experts.per_token // count * count
        if not routed:
            continue
        x = torch.randn(routed, k, device=device_type, dtype=torch.bfloat16)
        ends = torch.arange(1, count + 1, device=device_type, dtype=torch.int32) * (routed // count)
        one = torch.randn(n, k, device=device_type, dtype=torch.bfloat16)
        grouped_s = seconds(partial(torch._grouped_mm, x, weight.transpose(-2, -1), offs=ends))
        single_s = seconds(partial(torch.matmul, x, one.T))
        flops = 2.0 * routed * n * k
        rows.append((tokens, routed // count, flops / grouped_s / 1e12, flops / single_s / 1e12, single_s / grouped_s))
    columns = ("tokens", "tokens an expert", "grouped TFLOP/s", "one product TFLOP/s", "ratio")
    print_table(columns, rows, title=f"{count} experts of [{n}, {k}], {experts.per_token} a token")


def seconds(work: Callable[[], object]) -> float:
    """The median of a few calls on a card."""
    for _ in range(3):
        work()
    times = list[float]()
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return median(times)


if __name__ == "__main__":
    main()
