"""`isochunk plot`: pictures of a plan, a run and a trace, as SVG that parses and as PNG."""

from __future__ import annotations

import contextlib
import json
import math
import re
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from db.errors import UserError
from service.cli.main import cli
from service.pictures.latency import ttft_panel
from service.pictures.svg import CHARACTER, COLOURS, LINE_COLOURS, WIDTH, Axes, legend
from service.pictures.timeline import Bars, timeline_panel
from tests.tuner.atom import atom
from tuner.plan.plan import Chunk, Parallel, Plan, Request, load_plan, save_plan
from tuner.replays.comparison import compare_replays
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
    makespan_s = rounds - 1 + 3 + 0.8
    assert f"Measured: {makespan_s:.4g} s, {1 - 0.8 * rounds / makespan_s:.1%} of it" in words
    assert f"Predicted: {load_plan(plan).predicted.makespan_s:.4g} s, " in words  # type: ignore[union-attr]
    assert f"Predicted against measured: {4 * rounds} rounds, +25.0% in the median" in words


def test_a_trace_is_drawn_under_every_policy(plan: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"{5 * i},GPT-4,{2000 + 100 * i},10,20,API log" for i in range(12)]
    trace.write_text("\n".join(["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", *lines]))
    words = drawn(trace, "--plan", plan, "--rates", "1,4", "-o", tmp_path / "trace.svg")
    assert "TTFT by policy: trace.csv at 1 times its rate" in words and "fixed, best" in words
    assert "Throughput against mean TTFT, the trace at 1, 4 times its rate" in words


def test_a_trace_is_read_as_is_said(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text("\n".join(f'{{"input_length": 900, "timestamp": {i}}}' for i in range(12)))
    arguments = ["plot", "trace.jsonl", "--plan", "plan.json", "--rates", "2,1", "-o", "x.svg"]
    with contextlib.chdir(tmp_path):
        result = CliRunner().invoke(cli, [*arguments, "--time-unit", "s"])
    said = " ".join(result.output.split())
    assert "12 requests over 11 s, 1.09 a second (times in seconds, as --time-unit says)" in said


def test_a_line_of_the_distribution_steps_and_joint_has_one_colour() -> None:
    cost = atom(4)
    requests = [Request(id=f"r{i}", prompt_tokens=4096, arrival_s=float(i)) for i in range(4)]
    replays = compare_replays(cost, requests)
    lines = [line for line in ttft_panel(replays, "").elements if 'class="line"' in line]
    for line in lines:  # goes to the right or up, never both
        points = [tuple(map(float, point.split())) for point in line.split(' d="M')[1].split('"')[0].split("L")]
        assert all(x == x_next or y == y_next for (x, y), (x_next, y_next) in pairwise(points))
    own = next(line for line in lines if ">joint<" in line)
    assert f'stroke="{LINE_COLOURS[0]}"' in own


def test_no_number_is_cut_and_no_name() -> None:
    axes = Axes(x_range=(0.0, 100_000.0), y_range=(0.0, 1.0), top=0.0, height=10.0)
    labels = dict(re.findall(r'<text x="([\d.]+)"[^>]*>([\d,]+)<', "".join(axes.frame("", "", with_y=False))))
    for x, label in labels.items():
        assert float(x) + CHARACTER * len(label) / 2 <= WIDTH
    assert "100,000" in labels.values()
    words = "".join(legend(["x" * 300, "short"], ["#000", "#111"], 0.0)[0])
    assert "x" * 30 in words and "x" * 120 not in words and "short" in words


def test_all_rounds_of_a_long_plan_are_drawn() -> None:
    requests = (Request(id="a", prompt_tokens=64 * 4000), Request(id="b", prompt_tokens=64 * 4000))
    rounds = tuple((Chunk(i // 4000, 64 * (i % 4000), 64),) for i in range(8000))
    plan = Plan(
        model={}, precision="unknown", window=None, requests=requests, rounds=rounds,
        parallel=Parallel(tp_size=1, pp_size=1, layer_partition=(1,)),
    )  # fmt: skip
    bars = [(i, 0, float(i + (1000 if i >= 4000 else 0)), i + 1.0 + (1000 if i >= 4000 else 0)) for i in range(8000)]
    a_bar = r'<rect x="([\d.]+)" y="44.0" width="([\d.]+)" height="26.0" fill="(.*?)"'
    boxes = re.findall(a_bar, "".join(timeline_panel(plan, Bars("All", bars)).elements))
    found = [(float(x), float(x) + float(width), colour) for x, width, colour in boxes]
    assert 1000 < len(found) < 8000 and found[-1][1] == pytest.approx(WIDTH - 20, abs=0.2)
    gaps = [after[0] - before[1] for before, after in pairwise(found)]
    assert sorted(gaps)[-2] < 0.2 and max(gaps) == pytest.approx(1000 / 9000 * 750, abs=0.3)
    assert {colour for *_, colour in found[:10]} == {COLOURS[0]} and found[-1][2] == COLOURS[1]


def test_colours_are_told_apart() -> None:
    apart = min(math.dist(_lab(one), _lab(other)) for one, other in combinations(COLOURS, 2))
    assert apart > 25.0


def _lab(colour: str) -> tuple[float, float, float]:
    """In CIELAB, in which equal distances look about equally far."""
    red, green, blue = (
        ((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92
        for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    )
    x, y, z = (
        0.4124 * red + 0.3576 * green + 0.1805 * blue,
        0.2126 * red + 0.7152 * green + 0.0722 * blue,
        0.0193 * red + 0.1192 * green + 0.9505 * blue,
    )
    fx, fy, fz = (c ** (1 / 3) if c > 0.008856 else 7.787 * c + 16 / 116 for c in (x / 0.9505, y, z / 1.089))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


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
        (("cost.json", "-o", "x.svg"), "FILE: cost.json; is of schema isochunk.cost-model/1; a plan, a run's"),
        (("object.json", "-o", "x.svg"), "FILE: object.json; is an object with a, b, c, d...; a plan, a run's"),
        (("list.json", "-o", "x.svg"), "FILE: list.json; is JSON, but no object; a plan, a run's"),
        (("cut.json", "-o", "x.svg"), "FILE: cut.json; a plan, a run's --output, a quantize report or a trace is"),
        (("empty.json", "-o", "x.svg"), "FILE: empty.json; a plan, a run's --output, a quantize report or a trace is"),
        (("quantized.json", "-o", "x.svg"), "FILE: quantized.json; tells no ranges: quantize with --calibration"),
        (("run.json", "--plan", "plan.json", "-o", "x.svg"), "--plan: plan.json; has other rounds or stages than run"),
        (("trace.jsonl", "--cost-model", "cost.json", "-o", "x.svg"), "--pp-size: missing; a cost model with one"),
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
    Path("cost.json").write_text(json.dumps(atom(1).to_json() | {"schema": "isochunk.cost-model/1"}))
    Path("object.json").write_text('{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}')
    Path("list.json").write_text("[]")
    Path("cut.json").write_text(plan.read_text()[:200])
    Path("empty.json").write_text("")
    Path("quantized.json").write_text('{"precision": "w8a8", "linears": []}')
    with pytest.raises(UserError) as refused:
        CliRunner().invoke(cli, ["plot", *arguments], standalone_mode=False, catch_exceptions=False)
    assert str(refused.value).startswith(message)
    assert not Path("x.svg").exists()
