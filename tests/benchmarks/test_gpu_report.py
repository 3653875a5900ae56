"""The tuner on measurements and runs of real cards, kept in the repository."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import pytest

from benchmarks.gpu_report import KEPT, Judged, judge, opened, print_predictions, print_regret
from db.engine import Database
from db.hardware import Hardware, list_hardware
from db.measurements import load_measurements
from profiler.model import load_model_shape
from tuner.fit import fit_layer_costs
from tuner.layout import enumerate_layouts
from tuner.plan import Request
from tuner.rows import RankWork
from tuner.search import Rules, Target, search_layouts

TAUGHT = 32768


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with opened(KEPT) as kept:
        yield kept


@pytest.fixture(scope="module")
def hardware(database: Database) -> Hardware:
    (stored,) = list_hardware(database)
    return stored.hardware


@pytest.fixture(scope="module")
def judged(database: Database, hardware: Hardware) -> list[Judged]:
    return judge(database, hardware, TAUGHT)


def test_runs_make_predictions_of_other_plans_better(judged: list[Judged]) -> None:
    unseen = [one for one in judged if not one.taught]
    first = median(abs(one.first_s / one.measured_s - 1) for one in unseen)
    corrected = median(abs(one.corrected_s / one.measured_s - 1) for one in unseen)
    assert len(unseen) >= 20
    assert corrected < 0.03 < first


def test_the_choice_is_within_two_percent_of_the_best_measured(judged: list[Judged]) -> None:
    for workload in {one.workload for one in judged}:
        mine = [one for one in judged if one.workload == workload]
        if len(mine) < 4:
            continue
        chosen = min((one for one in mine if one.plan.policy == "joint"), key=lambda one: one.first_s)
        assert chosen.measured_s <= 1.02 * min(one.measured_s for one in mine), workload


def test_a_laptop_plans_for_the_cards(database: Database, hardware: Hardware) -> None:
    shape = load_model_shape("llama-3-8b")
    rows = load_measurements(database, hardware, dtype="bfloat16")
    target = Target(
        shape=shape,
        dtype="bfloat16",
        requests=(Request(id="a", prompt_tokens=TAUGHT), Request(id="b", prompt_tokens=5000)),
        device_type="cuda",
        memory_bytes=hardware.memory_bytes,
    )
    candidates = search_layouts(
        target,
        enumerate_layouts(shape, 2),
        Rules(chunk_multiple=256),
        lambda layout: fit_layer_costs(
            rows, RankWork(shape=shape, dtype="bfloat16", tp_size=layout.tp_size), busy_ranks=layout.world_size
        ),
    )
    assert [one.refusal for one in candidates] == [None] * 3
    seconds = {str(one.layout): one.rounds.makespan_s for one in candidates if one.rounds}
    assert seconds["TP1 PP2"] < seconds["TP2 PP1"] < seconds["TP1 PP1"]
    assert candidates[0].rounds is not None and len(candidates[0].rounds.rounds) > 8


def test_the_report_prints(judged: list[Judged], capsys: pytest.CaptureFixture[str]) -> None:
    print_predictions(judged)
    print_regret(judged)
    printed = capsys.readouterr().out
    assert "runs not taught from, corrected: median" in printed and "regret %" in printed
