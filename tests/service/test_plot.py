"""`isochunk plot`: pictures of a plan, a run and a trace, as SVG that parses and as PNG."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from db.errors import UserError
from service.cli.main import cli
from tests.tuner.atom import atom
from tuner.plan.plan import Parallel, Plan, Request, load_plan, save_plan
from tuner.rounds.round_plan import rounds_to_plan
from tuner.search.planner import plan_rounds

REQUESTS = (Request(id="long", prompt_tokens=32768), Request(id="short", prompt_tokens=2048))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    cost = atom(4)
    made: Plan = rounds_to_plan(
        plan_rounds(cost, REQUESTS, policy="fixed:4096"), requests=REQUESTS, model={}, precision="unknown",
        parallel=Parallel(tp_size=1, pp_size=4, layer_partition=(1,) * 4), window=None, cost_model=cost.to_json(),
    )  # fmt: skip
    save_plan(tmp_path / "plan.json", made)
    return tmp_path / "plan.json"


def drawn(*arguments: object) -> str:
    """The words of the picture that a call wrote."""
    output = Path(str(arguments[-1]))
    CliRunner().invoke(cli, ["plot", *map(str, arguments)], standalone_mode=False, catch_exceptions=False)
    return " ".join("".join(each.itertext()) for each in ElementTree.fromstring(output.read_text()).iter())


def test_a_plan_is_a_timeline_and_the_cost_of_a_token(plan: Path, tmp_path: Path) -> None:
    words = drawn(plan, "-o", tmp_path / "plan.svg")
    assert "fixed:4096, predicted" in words and "of it bubbles" in words
    assert "stage 3" in words and "long (32768)" in words and "What a token costs by its position" in words
    rounds = load_plan(plan).rounds
    assert words.count("round 0, ") >= 4 and f"round {len(rounds) - 1}, " in words


def test_a_run_is_drawn_beside_its_prediction(plan: Path, tmp_path: Path) -> None:
    rounds = len(load_plan(plan).rounds)
    times = [
        {"round": i, "stage": k, "predicted_s": 1.0, "start_s": i + k, "finish_s": i + k + 0.8}
        for i in range(rounds) for k in range(4)
    ]  # fmt: skip
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"makespans_s": [1.0], "rounds": times}))
    words = drawn(run, "--plan", plan, "-o", tmp_path / "run.svg")
    assert "Measured: " in words and "Predicted: " in words
    assert f"Predicted against measured: {4 * rounds} rounds, +25.0% in the median" in words


def test_a_trace_is_drawn_under_every_policy(plan: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"{5 * i},GPT-4,{2000 + 100 * i},10,20,API log" for i in range(12)]
    trace.write_text("\n".join(["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", *lines]))
    words = drawn(trace, "--plan", plan, "--rates", "1,4", "-o", tmp_path / "trace.svg")
    assert "TTFT by policy: trace.csv at 1 times its rate" in words and "fixed, best" in words
    assert "Throughput against mean TTFT, the trace at 1, 4 times its rate" in words


def test_a_png_is_written_by_its_name(plan: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    output = tmp_path / "plan.png"
    CliRunner().invoke(cli, ["plot", str(plan), "-o", str(output)], standalone_mode=False, catch_exceptions=False)
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan.json", "-o", "x.pdf"), "-o: x.pdf; a file that ends in .svg or .png"),
        (("none.json", "-o", "x.svg"), "FILE: none.json; must be a readable file"),
        (("run.json", "-o", "x.svg"), "--plan: missing; a run's output does not say"),
        (("trace.jsonl", "-o", "x.svg"), "--cost-model: missing; trace.jsonl is drawn as a trace"),
        (("trace.jsonl", "--plan", "plan.json", "--rates", "1,x", "-o", "x.svg"), "--rates: x; numbers above 0"),
    ],
)
def test_what_cannot_be_drawn_is_named(
    arguments: tuple[str, ...], message: str, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plan.parent)
    Path("run.json").write_text('{"makespans_s": [1.0], "rounds": []}')
    Path("trace.jsonl").write_text('{"input_length": 5}\n')
    with pytest.raises(UserError) as refused:
        CliRunner().invoke(cli, ["plot", *arguments], standalone_mode=False, catch_exceptions=False)
    assert str(refused.value).startswith(message)
    assert not Path("x.svg").exists()
