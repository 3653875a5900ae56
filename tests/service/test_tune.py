"""`isochunk tune` as a user calls it, on rows of an imaginary machine kept in a real database."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from db.errors import UserError
from db.rows.archive import import_hardware
from db.rows.fits import list_fits
from db.rows.hardware import Hardware, list_hardware
from db.rows.measurements import load_measurements, save_measurements
from db.rows.plans import list_plan_rows
from db.store.engine import open_database
from profiler.kernels.attention_kernel import AttentionKernel
from service.cli.main import cli
from service.reasons.sought import NAMES
from tests.structures import ROOT
from tests.tuner.measured import CHUNKS, SHAPE, Machine, measure, with_ranks
from tuner.plan.attention_kernels import AttentionKernels
from tuner.plan.plan import TunedFor, load_plan
from tuner.workload.objective import Objective

HARDWARE = Hardware(
    device="imaginary", device_count=2, memory_bytes=32 * 2**30, driver="d", torch_version="t", backend="gloo",
    num_threads=1, link="lo",
)  # fmt: skip
COST_MODEL: dict[str, Any] = {
    "schema": "isochunk.cost-model/1",
    "stages": [{
        "round_overhead_s": 0.0436,
        "tokens": {"count": [0, 65536], "seconds": [0.0, 0.395]},
        "attention": {"pair_s": 6.5e-10, "context_token_s": 5.39e-7},
    }],
    "hop": {"latency_s": 0.0, "token_s": 0.0},
    "return_s": 0.0,
}  # fmt: skip

TEN_TOKENS = (SHAPE.name, "--prompt-lens", "10")
BY_TTFT = (*TEN_TOKENS, "--objective", "mean-ttft")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that knows the imaginary machine, to be copied."""
    path = tmp_path_factory.mktemp("measured") / "rows.db"
    with open_database(f"sqlite:///{path}") as database:
        rows = [row for tp_size in (1, 2) for row in measure(Machine(), tp_size=tp_size)]
        unique = {row.key: row for row in rows}
        save_measurements(database, HARDWARE, unique.values())
    return path


@pytest.fixture
def url(measured: Path, tmp_path: Path) -> str:
    """A copy of it."""
    return f"sqlite:///{shutil.copy(measured, tmp_path / 'rows.db')}"


def tune(*arguments: str) -> str:
    """Output of a call that succeeds; a refusal raises."""
    done = CliRunner().invoke(cli, ["tune", *arguments], standalone_mode=False, catch_exceptions=False)
    return done.stdout


def tune_json(*arguments: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(tune(*arguments, "--json"))
    return parsed


def test_the_best_layout_is_written_as_a_plan_and_kept_as_a_row(url: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    arguments = (SHAPE.name, "--world-size", "2", "--prompt-lens", "6000,700", "--dtype", "float32", "--db", url)
    report = tune_json(*arguments, "-o", str(out))
    plan = load_plan(out)
    makespans = [layout["makespan_s"] for layout in report["layouts"] if "makespan_s" in layout]
    assert makespans == sorted(makespans)
    worse = [layout for layout in report["layouts"] if layout["proven_worse"]]
    assert report["num_proven_worse"] == len(worse)
    assert all(layout["floor_s"] >= makespans[0] for layout in worse)
    estimated = [layout for layout in report["layouts"] if layout["estimated_worse"]]
    assert report["num_estimated_worse"] == len(estimated)
    assert all(layout["estimate_s"] > makespans[0] for layout in estimated)
    assert plan.predicted is not None
    assert plan.predicted.makespan_s == makespans[0]
    assert plan.predicted.lower_bound_s is not None
    assert plan.predicted.lower_bound_s <= plan.predicted.makespan_s
    assert [request.prompt_tokens for request in plan.requests] == [6000, 700]
    assert sum(plan.parallel.layer_partition) == SHAPE.num_layers
    assert plan.attention_kernels == AttentionKernels(usual=AttentionKernel.CPU_FOLDED)  # the one that was measured
    baseline, ours = sorted(report["policies"], key=lambda one: one["policy"])
    assert ours["policy"] == "joint"
    assert baseline["policy"].startswith("fixed:")
    assert ours["gap"] == pytest.approx(plan.predicted.gap)
    with open_database(url) as database:
        assert len(list_plan_rows(database)) == 1
        assert list_fits(database)[0].model_name == SHAPE.name


def test_a_layer_partition_can_be_kept_and_a_device_is_this_machines(url: str) -> None:
    arguments = (SHAPE.name, "--prompt-lens", "3000@1000,800*2", "--dtype", "float32", "--db", url)
    report = tune_json(*arguments, "--layer-partition", "7,9")
    plan, alone = report["plan"], report["recommendation"]["one_card"]
    assert alone["refusal"] is None and alone["makespan_s"] > plan["predicted"]["makespan_s"]
    assert plan["parallel"]["layer_partition"] == [7, 9]
    assert [request["cached_tokens"] for request in plan["requests"]] == [1000, 0, 0]
    with pytest.raises(UserError, match=r"^measurements: none in float32 on (?!imaginary)"):
        tune(*arguments, "--device", "cpu")


def test_the_tables_name_layouts_policies_and_errors(url: str) -> None:
    arguments = (SHAPE.name, "--world-size", "2", "--prompt-lens", "3000", "--dtype", "float32", "--db", url)
    text = tune(*arguments)
    for words in ("Held-out errors on imaginary", "TP1 PP2", "TP2 PP1", "joint", "fixed:", "gap %", "best possible"):
        assert words in text
    assert "terapipe" not in text
    compared = tune(*arguments, "--compare")
    for words in ("fixed:512", "gpipe", "sglang", "ascend", "terapipe", "dp", "joint"):
        assert words in compared


@pytest.mark.parametrize(
    ("objective", "column"),
    [("mean-ttft", "TTFT s"), ("p99-ttft", "p99 s"), ("sla", "met %"), ("lateness", "met %")],
)
def test_layouts_are_shown_by_what_is_sought(url: str, objective: str, column: str) -> None:
    arguments = (SHAPE.name, "--world-size", "2", "--prompt-lens", "3000,1000", "--dtype", "float32", "--db", url)
    out = tune(*arguments, "--objective", objective, *(("--sla-ttft-s", "9") if column == "met %" else ()))
    head = next(line for line in out.splitlines() if line.startswith(" layout"))
    assert head.index(column) < head.index("makespan s")


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        ("makespan", ""),
        ("mean-ttft", "mean TTFT"),
        ("p99-ttft", "p99 TTFT"),
        ("sla", "deadlines"),
        ("lateness", "latest"),
    ],
)
def test_gains_and_changes_are_told_by_what_is_sought(url: str, objective: str, name: str) -> None:
    arguments = (SHAPE.name, "--world-size", "2", "--prompt-lens", "3000,1000", "--dtype", "float32", "--db", url)
    arguments = (
        *arguments,
        "--objective",
        objective,
        *(("--sla-ttft-s", "1.5") if objective in ("sla", "lateness") else ()),
    )
    text = " ".join(tune(*arguments).split())
    report = tune_json(*arguments)
    made, why, best = report["recommendation"], report["why"], report["layouts"][0]
    figures = {"makespan": "makespan_s", "mean-ttft": "mean_ttft_s", "sla": "sla_met", "lateness": "lateness_s"}
    if objective in figures:
        assert made["sought"] == best[figures[objective]]
    gains = made["words"]["gains"]
    for other in (made["one_card"], made["simple"]):  # each figure that is told is that of the objective
        figure = f"{100 * other['sought']:.1f}%" if objective == "sla" else f"{abs(other['sought']):.4g} s"
        assert figure in gains
    assert gains.count(name) >= 2
    if objective in ("makespan", "mean-ttft", "p99-ttft"):
        factor = made["one_card"]["sought"] / made["sought"]
        assert made["gain_over_one_card"] == pytest.approx(factor)
        assert f"{factor:.2f} times as fast" in gains
    else:
        assert made["gain_over_one_card"] is None
        assert "Why TP" not in text  # parts of a makespan are none of deadlines met
    here = next(winner for winner in why["by_link"] if winner["link_factor"] == 1.0)
    sign = -1.0 if objective == "sla" else 1.0
    assert sign * here["sought"] >= sign * made["sought"] - 1e-9  # equal chunks are no better than the plan
    if "changes" in made["words"]:
        by = made["words"]["changes"].split(":")[0]
        assert by == "By plans of equal chunks" + (
            "" if objective == "makespan" else f" and {NAMES[Objective(objective)]}"
        )
    for move in report["plan"]["predicted"]["moves"]:
        reached = move["makespan_s"] if objective == "makespan" else move["sought"]
        assert sign * reached < sign * made["sought"]
    if objective == "mean-ttft":
        assert "less mean TTFT." in text and f"of its mean TTFT of {made['sought']:.4g} s" in text


@pytest.mark.parametrize("objective", ["makespan", "mean-ttft", "p99-ttft", "sla", "lateness"])
def test_gains_of_a_trace_are_those_of_what_is_sought(url: str, objective: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"input_length": 600 + 400 * i, "timestamp": 150 * i, "sla_ttft_s": 0.4} for i in range(6)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    arguments = (
        SHAPE.name,
        "--pp-size",
        "2",
        "--tp-size",
        "1",
        "--workload",
        str(trace),
        "--dtype",
        "float32",
        "--db",
        url,
    )
    report = tune_json(*arguments, "--objective", objective)
    made = report["recommendation"]
    names = {"makespan": "makespan_s", "mean-ttft": "mean_ttft_s", "p99-ttft": "p99_ttft_s", "sla": "sla_met"}
    taken = next(row for row in report["replays"] if row["taken"] == report["plan"]["policy"])
    assert made["sought"] == pytest.approx(taken[names.get(objective, "lateness_s")])
    assert made["simple"] is None and "changes" not in made["words"]
    assert report["plan"]["predicted"]["moves"] == []
    other = made["one_card"]["sought"]
    assert (f"{100 * other:.1f}%" if objective == "sla" else f"{abs(other):.4g} s") in made["words"]["gains"]
    assert report["why"]["by_link"] == []
    assert ("Why TP" in tune(*arguments, "--objective", objective)) == (objective == "makespan")
    assert report["plan"]["tuned_for"] == {"objective": objective}
    if objective != "makespan":
        with pytest.raises(UserError, match=r"^--max-makespan-increase: 5%; has no meaning for requests that arrive"):
            tune(*arguments, "--objective", objective, "--max-makespan-increase", "5%")


def test_what_a_plan_was_tuned_for_is_kept_in_it(url: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    arguments = (SHAPE.name, "--world-size", "1", "--prompt-lens", "3000,1000*3", "--dtype", "float32", "--db", url)
    by_ttft = (*arguments, "--objective", "mean-ttft", "-o", str(out))
    found = {}
    for most in ("0%", "5%", "none"):
        tune(*by_ttft, "--max-makespan-increase", most)
        found[most] = plan = load_plan(out)
        share = None if most == "none" else float(most[:-1]) / 100
        assert plan.tuned_for == TunedFor(objective=Objective.MEAN_TTFT, max_makespan_increase=share)
    tune(*arguments, "-o", str(out))
    quickest = load_plan(out)
    assert quickest.tuned_for == TunedFor()
    spans = {most: plan.predicted.makespan_s for most, plan in found.items() if plan.predicted}
    means = {most: sum(plan.predicted.ttft_s) for most, plan in found.items() if plan.predicted}
    assert quickest.predicted is not None
    assert spans["0%"] <= quickest.predicted.makespan_s * (1 + 1e-9)
    assert spans["5%"] <= 1.05 * quickest.predicted.makespan_s
    assert means["none"] <= means["5%"] < means["0%"]


def test_the_recommendation_comes_first(url: str) -> None:
    arguments = (SHAPE.name, "--world-size", "2", "--prompt-lens", "3000", "--dtype", "float32", "--db", url)
    arguments = (*arguments, "--price-per-gpu-hour", "2")
    text = tune(*arguments)
    first = [line.split()[0] for line in text.splitlines()[1:14] if line[:3] != "   "]
    assert first[:4] == ["run", "that", "takes", "costs"]
    assert text.startswith("Recommended\n") and "give or take" in text and "None" not in text
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    report = tune_json(*arguments)
    recommended = report["recommendation"]
    layouts = {one["makespan_s"] for one in report["layouts"] if "makespan_s" in one}
    assert recommended["makespan_s"] == min(layouts)
    assert recommended["tokens_per_s"] == pytest.approx(3000 / recommended["makespan_s"])
    assert recommended["cost_per_million_tokens"] == pytest.approx(
        1e6 / 3000 * recommended["makespan_s"] * 2 * 2 / 3600
    )
    assert 1.0 < recommended["gain_over_one_card"] <= 2.0
    assert recommended["gain_over_simple"] >= 1.0 and recommended["simple"]["policy"].startswith("fixed:")
    assert recommended["warning"] is None and 0.0 < recommended["mfu"] <= 1.0
    assert recommended["next"].endswith("--output plan.json --db " + url)


def test_a_prediction_from_almost_nothing_is_called_a_guess(tmp_path: Path) -> None:
    url, kept = f"sqlite:///{tmp_path / 'few.db'}", (CHUNKS[0], CHUNKS[-1])
    sized = ("matmul", "attention", "elementwise", "send_recv")
    rows = [row for row in measure(Machine()) if row.op not in sized or row.shape.get(
        "m", row.shape.get("chunk", row.shape.get("tokens", CHUNKS[0]))) in kept]  # fmt: skip
    with open_database(url) as database:
        save_measurements(database, HARDWARE, {row.key: row for row in rows}.values())
    arguments = (SHAPE.name, "--tp-size", "1", "--pp-size", "2", "--prompt-lens", "3000", "--dtype", "float32")
    text = tune(*arguments, "--db", url)
    words = " ".join(text.split())
    assert words.startswith("A GUESS: ") and "points that this plan leans on were not measured" in words
    assert "Measure them: isochunk profile llama-3.2-1b --world-size 2 --tp-sizes 1 --context-length 3000" in words
    assert "sure not at all" in words and "of 0 points" not in words
    plan = tune_json(*arguments, "--db", url)["plan"]
    assert plan["predicted"]["uncertainty"] >= 1.0


def test_a_quicker_card_is_named_and_its_stage_holds_more_layers(url: str) -> None:
    arguments = (SHAPE.name, "--tp-size", "1", "--pp-size", "2", "--prompt-lens", "3000", "--dtype", "float32")
    arguments = (*arguments, "--db", url)
    alike = tune_json(*arguments)
    assert alike["rank_factors"] == []
    with open_database(url) as database:
        save_measurements(database, HARDWARE, with_ranks(measure(Machine()), 1.0, 0.8))
    differing = tune_json(*arguments)
    assert differing["rank_factors"] == pytest.approx([1.0, 0.8])
    assert differing["layouts"][0]["makespan_s"] < 0.95 * alike["layouts"][0]["makespan_s"]
    first, second = differing["layouts"][0]["layer_partition"]
    assert first < second
    assert "Each rank's time over the slowest's: 1.000, 0.800" in tune(*arguments)


def test_refused_layouts_say_why(url: str) -> None:
    arguments = (SHAPE.name, "--world-size", "6", "--prompt-lens", "3000", "--dtype", "float32", "--db", url)
    layouts = tune_json(*arguments)["layouts"]
    refusals = {(x["tp_size"], x["pp_size"]): x["refusal"] for x in layouts if x["sp_size"] == 1}
    assert "must divide num_attention_heads" in refusals[3, 2]
    assert refusals[1, 6] is None


def test_sizes_and_policy_can_be_kept(url: str) -> None:
    plan = tune_json(
        SHAPE.name, "--tp-size", "1", "--pp-size", "2", "--policy", "fixed:512", "--window", "3",
        "--prompt-lens", "2048", "--dtype", "float32", "--db", url,
    )["plan"]  # fmt: skip
    assert [sum(chunk["tokens"] for chunk in chunks) for chunks in plan["rounds"]] == [512] * 4
    assert plan["window"] == 3
    assert plan["policy"] == "fixed:512"


TOPOLOGY = {
    "schema": "isochunk.topology/1", "hosts": 2, "cards_per_host": 2,
    "inside_host": {"bandwidth_gb_s": 20.0, "latency_us": 10.0},
    "between_hosts": {"bandwidth_gb_s": 0.05, "latency_us": 50.0},
}  # fmt: skip


def test_the_schemes_of_a_layout_can_be_kept(url: str, tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    path.write_text(json.dumps(TOPOLOGY))
    arguments = (SHAPE.name, "--prompt-lens", "3000", "--dtype", "float32", "--db", url, "--topology", str(path))
    pins = ("--sp-size", "2", "--sp-kind", "gather", "--pp-size", "2", "--virtual-stages", "2", "--stage-order", "v")
    report = tune_json(*arguments, *pins)
    assert report["plan"]["parallel"] == {
        "tp_size": 1, "pp_size": 2, "sp_size": 2, "sp_kind": "gather", "virtual_stages": 2, "stage_order": "v",
        "weights": "whole", "layer_partition": [4, 4, 4, 4],
    }  # fmt: skip
    assert len(report["plan"]["cuts"]) == len(report["plan"]["rounds"])
    (layout,) = report["layouts"]
    assert layout["assumed"] == ["hand-offs between hosts"]
    width = report["plan"]["predicted"]["uncertainty"]
    measured = (SHAPE.name, "--prompt-lens", "3000", "--dtype", "float32", "--db", url, "--pp-size", "2")
    assert width >= 1.9 * tune_json(*measured)["plan"]["predicted"]["uncertainty"]
    text = tune(*arguments, *pins)
    assert "Not measured, estimated from the topology's links: hand-offs between hosts" in text.replace("\n", " ")


def test_a_paragraph_and_a_picture_say_why(url: str, tmp_path: Path) -> None:
    plot = tmp_path / "why.svg"
    arguments = (SHAPE.name, "--world-size", "2", "--prompt-lens", "3000", "--dtype", "float32", "--db", url)
    text = tune(*arguments, "--plot", str(plot))
    assert "\nWhy TP" in text
    assert "proven no better" in text.replace("\n", " ")
    assert all(len(line) <= 80 for line in text.splitlines() if "│" not in line and str(tmp_path) not in line)
    picture = ElementTree.fromstring(plot.read_text())
    words = " ".join("".join(each.itertext()) for each in picture.iter())
    assert "Where the seconds go" in words and "Which layout wins" in words and "16K" in words
    report = tune_json(*arguments, "--plot", str(plot))
    why = report["why"]
    best = why["families"][0]
    assert sum(best["seconds"].values()) == pytest.approx(report["layouts"][0]["makespan_s"], rel=1e-6)
    assert {winner["link_factor"] for winner in why["map"]} == {1 / 64, 1 / 16, 1 / 4, 1.0, 4.0}
    at_length = [winner for winner in why["map"] if winner["prompt_tokens"] == 4096]
    seconds = [winner["sought"] for winner in sorted(at_length, key=lambda winner: winner["link_factor"])]
    assert seconds == sorted(seconds, reverse=True)  # quicker links never make the best slower


def test_one_card_is_planned_as_well_as_by_terapipe(tmp_path: Path) -> None:
    """What cuts best on one card follows the waves of its kernels, which rounds of equal time do not."""
    url = f"sqlite:///{tmp_path / 'cards.db'}"
    with open_database(url) as database:
        import_hardware(database, ROOT / "benchmarks/results/h100x2-nvlink.profile.json.gz")
    arguments = ("llama-3-8b", "--world-size", "1", "--prompt-lens", "131072", "--hardware", "1", "--db", url)
    rows = {row["policy"]: row["makespan_s"] for row in tune_json(*arguments, "--compare")["policies"]}
    assert rows["joint"] == min(rows.values())
    assert rows["joint"] <= 10.64
    assert tune_json(*arguments)["plan"]["predicted"]["makespan_s"] == rows["joint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt-lens", "10"), "MODEL: missing; give a model"),
        ((SHAPE.name,), "--prompt-lens: missing; give either"),
        ((SHAPE.name, "--prompt-lens", "10,x"), "--prompt-lens: x; must be a whole number"),
        ((SHAPE.name, "--prompt-lens", "0"), "--prompt-lens: 0; must be from 1"),
        ((SHAPE.name, "--prompt-lens", "10,2199023255552"), "--prompt-lens: 2199023255552; must be from 1 to"),
        ((SHAPE.name, "--prompt-lens", "9" * 5000), "--prompt-lens: 9999"),
        ((SHAPE.name, "--prompt-lens", "999999999"), "prompt_tokens of request r0: 999999999; at most 131072"),
        ((*TEN_TOKENS, "--window", "0"), "--window: 0; must be from 1 to"),
        ((*TEN_TOKENS, "--window", "9" * 5000), "--window: 9999"),
        ((*TEN_TOKENS, "--window", "²"), "--window: ²; must be a whole number"),
        ((*TEN_TOKENS, "--policy", "fixed:²"), "policy: fixed:²; fixed:N with N"),
        ((*TEN_TOKENS, "--policy", "fixed:" + "9" * 5000), "policy: fixed:9999"),
        ((*TEN_TOKENS, "-o", "x" * 300), "-o: xxx"),
        ((*TEN_TOKENS, "--dtype", "int4"), "--dtype: int4; supported are"),
        ((*TEN_TOKENS, "--world-size", "0"), "--world-size: 0; must be more than 0"),
        ((*TEN_TOKENS, "--pp-size", "-1"), "--pp-size: -1; must be more than 0"),
        ((*TEN_TOKENS, "--threads-per-rank", "0"), "--threads-per-rank: 0; must be more than 0"),
        ((*TEN_TOKENS, "--max-new-tokens", "0"), "--max-new-tokens: 0; must be more than 0"),
        ((*TEN_TOKENS, "--measure", "1", "--repeat", "0"), "--repeat: 0; must be more than 0"),
        ((*TEN_TOKENS, "--chunk-multiple", "0"), "chunk_multiple: 0; at least 1"),
        ((*TEN_TOKENS, "--max-makespan-increase", "2%"), "--max-makespan-increase: 2%; goes with --objective mean"),
        ((*BY_TTFT, "--max-makespan-increase", "much"), "--max-makespan-increase: much; must be a share such as 0.5%"),
        ((*BY_TTFT, "--max-makespan-increase", "2"), "--max-makespan-increase: 2; must be a share such as 0.5%"),
        ((*BY_TTFT, "--max-makespan-increase", "-1%"), "--max-makespan-increase: -1%; must be a share such as 0.5% or"),
        ((*TEN_TOKENS, "--objective", "sla"), "--sla-ttft-s: missing; the objective sla needs"),
        ((*TEN_TOKENS, "--objective", "sla", "--sla-ttft-s", "nan"), "--sla-ttft-s: nan; must be more than 0"),
        ((SHAPE.name, "--prompt-lens", "131072", "--max-new-tokens", "9"), "prompt_tokens of request r0: 131072; at"),
        ((*TEN_TOKENS, "--cost-model", "cost.json"), "--cost-model: cost.json; stands instead of a model"),
        ((*TEN_TOKENS, "--policy", "best"), "policy: best; "),
        ((*TEN_TOKENS, "--sp-size", "0"), "--sp-size: 0; must be more than 0"),
        ((*TEN_TOKENS, "--sp-size", "2", "--sp-kind", "none"), "sp_size: 2; 1 with sp_kind none"),
        ((*TEN_TOKENS, "--sp-size", "64", "--sp-kind", "ulysses"), "layouts: none can run: TP1 SP64 ulysses PP1: sp_"),
        ((*TEN_TOKENS, "--tp-size", "1", "--sp-kind", "megatron"), "sp_kind: megatron; cuts over"),
        ((*TEN_TOKENS, "--pp-size", "2", "--virtual-stages", "99"), "layouts: none can run: TP1 PP2 x99 loop: v"),
        ((*TEN_TOKENS, "--world-size", "4", "--sp-size", "3"), "world_size: 4; must be a multiple of tp_size x s"),
        ((*TEN_TOKENS, "--plot", "why.png"), "--plot: why.png; must end in .svg"),
        ((*TEN_TOKENS, "--topology", "/nowhere.json"), "--topology: /nowhere.json; must be a readable file"),
        ((*TEN_TOKENS, "--tp-size", "3"), "layouts: none can run: TP3 PP1: tp_size: 3; must"),
        ((*TEN_TOKENS, "--pp-size", "99"), "layouts: none can run: TP1 PP99: pp_size 99 is"),
        ((*TEN_TOKENS, "--dtype", "bfloat16"), "measurements: none in bfloat16 on imaginary; "),
        ((*TEN_TOKENS, "--layer-partition", "8,9"), "--layer-partition: 8,9; at least one layer each, 16 in all"),
        ((*TEN_TOKENS, "--layer-partition", "8,8", "--pp-size", "4"), "--layer-partition: 8,8; 4 numbers: one a stage"),
        ((*TEN_TOKENS, "--dtype", "float32", "--memory-gib", "0.3"), "layouts: none can run: TP1 PP1: needs 5.88 GiB"),
        ((*TEN_TOKENS, "--hardware", "7"), "hardware: 7; must be one of 1"),
        ((*TEN_TOKENS, "--hardware", "1", "--device", "cuda"), "--device: cuda; --hardware 1 is imaginary, of --dev"),
        (("llama-9", "--prompt-lens", "10"), "MODEL: llama-9; must be a folder with a config.json, an id"),
        (("qwen3-0.6b", "--prompt-lens", "10", "--dtype", "float32"), "layouts: none can run: TP1 PP1: measurements:"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments: tuple[str, ...], message: str, url: str) -> None:
    with pytest.raises(UserError) as refused:
        tune(*arguments, "--db", url)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_nothing_measured_says_which_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^measurements: none .*; measure them first: isochunk profile"):
        tune(*TEN_TOKENS, "--db", f"sqlite:///{tmp_path / 'empty.db'}")


def test_a_precision_is_chosen_by_what_it_loses(url: str, tmp_path: Path) -> None:
    with open_database(url) as database:
        (stored,) = list_hardware(database)
        rows = load_measurements(database, stored.hardware)
        for dtype, factor in (("w8a8+float32", 0.5), ("fp8+float32", 0.4), ("w8a16+float32", 0.8)):
            names = ("min_us", "p10_us", "median_us", "p90_us", "std_us")
            faster = [
                replace(row, dtype=dtype, **{name: getattr(row, name) * factor for name in names}) for row in rows
            ]
            save_measurements(database, HARDWARE, faster)
    reports = []
    for precision, loss in (("w8a8", 0.004), ("fp8", 0.02)):
        reports.append(tmp_path / f"{precision}.json")
        reports[-1].write_text(json.dumps({"precision": precision, "perplexity_loss": loss, "linears": []}))
    asked = (SHAPE.name, "--prompt-lens", "2048", "--tp-size", "1", "--pp-size", "2", "--db", url)
    asked += ("--precision", "auto")
    asked += ("--quantize-reports", ",".join(map(str, reports)))
    found = tune_json(*asked)
    assert found["plan"]["precision"] == "w8a8+float32"
    own, *others = found["precisions"]
    by_name = {step["precision"]: step for step in others}
    assert own["precision"] == "float32" and own["loss"] == 0.0 and 0.0 < own["attention_share"] < 1.0
    assert by_name["w8a8+float32"]["makespan_s"] < 0.6 * own["makespan_s"]
    assert by_name["fp8+float32"]["refusal"] == "loses 2.00% of perplexity, more than 0.50%"
    assert "its loss is not known" in by_name["w8a16+float32"]["refusal"]
    out = tmp_path / "plan.json"
    assert "w8a16+float32 is not taken: " in " ".join(tune(*asked, "--max-loss", "3%", "-o", str(out)).split())
    assert load_plan(out).precision == "fp8+float32"
    for arguments, said in (
        (("--max-loss", "much"), "--max-loss: much; must be a share such as 0.5%"),
        (("--precision", "fp8"), "--quantize-reports: "),
        (("--quantize-reports", str(tmp_path / "no.json")), "--quantize-reports: "),
    ):
        with pytest.raises(UserError) as refused:
            tune(*asked, *arguments)
        assert str(refused.value).startswith(said)
    reports[0].write_text(json.dumps({"precision": "w8a8", "perplexity_loss": None}))
    with pytest.raises(UserError, match="tells no perplexity: quantize with --held-out"):
        tune(*asked)
