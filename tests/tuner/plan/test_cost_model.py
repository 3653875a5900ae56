import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from db.errors import UserError
from db.files.documents import write_json
from tests.tuner.strategies import cost_models
from tuner.plan.cost_model import CostModel, load_cost_model
from tuner.plan.stage_cost import PairAttention, StageCost, TableAttention
from tuner.plan.stage_order import StageOrder

DESIGN: dict[str, Any] = {
    "schema": "isochunk.cost-model/1",
    "stages": [
        {
            "round_overhead_s": 0.0436,
            "tokens": {"count": [0, 65536], "seconds": [0.0, 0.395]},
            "attention": {"pair_s": 6.5e-10, "context_token_s": 5.39e-7},
        }
    ],
    "hop": {"latency_s": 0.0, "token_s": 0.0},
    "return_s": 0.0,
}


def test_a_round_costs_what_the_file_format_says() -> None:
    model = CostModel.from_json(DESIGN).for_pp_size(4)
    chunks = [(1000, 5000, False), (200, 0, True)]
    pairs = sum(6.5e-10 * (c * p + c * (c + 1) / 2) + 5.39e-7 * p for c, p, _ in chunks)
    expected = 0.0436 + 1200 * 0.395 / 65536 + pairs
    assert model.stage_seconds(3, chunks) == pytest.approx(expected, rel=1e-12)


def test_the_optional_terms_count_chunks_and_ends() -> None:
    stage = StageCost(token_count=(0, 10), token_seconds=(0.0, 1.0), chunk_s=0.5, final_s=2.0)
    assert stage.seconds([(10, 0, False), (10, 0, True)]) == pytest.approx(2.0 + 2 * 0.5 + 2.0)


def test_tables_go_on_beyond_their_last_point() -> None:
    stage = StageCost(token_count=(4, 8), token_seconds=(1.0, 3.0))
    assert stage.tokens_s([2, 4, 6, 8, 12]).tolist() == [1.0, 1.0, 2.0, 3.0, 5.0]
    attention = TableAttention(count=(2, 4), base_s=(1.0, 2.0), context_s=(0.1, 0.2))
    assert attention.base([1, 3, 8]).tolist() == [1.0, 1.5, 8.0]
    assert attention.slope([1, 3, 8]) == pytest.approx([0.1, 0.15, 0.4])


def test_one_entry_stands_for_all_stages() -> None:
    model = CostModel.from_json(DESIGN)
    assert model.for_pp_size(8).pp_size == 8
    assert len(model.for_pp_size(8).kinds) == 1
    with pytest.raises(UserError, match=r"stages: 2; .*1 or pp_size \(4\)"):
        model.for_pp_size(2).for_pp_size(4)


@settings(max_examples=30, deadline=None)
@given(model=cost_models())
def test_files_hold_the_whole_model(model: CostModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cost") / "cost.json"
    write_json(path, model.to_json())
    assert load_cost_model(path).for_pp_size(model.pp_size) == model
    assert [entry.name for entry in path.parent.iterdir()] == ["cost.json"]


@settings(max_examples=50, deadline=None)
@given(model=cost_models(), chunk=st.integers(1, 9000), more=st.integers(0, 3000), context=st.integers(0, 20_000))
def test_more_work_never_costs_less(model: CostModel, chunk: int, more: int, context: int) -> None:
    for stage in model.kinds:
        seconds = stage.seconds([(chunk, context, False)])
        assert stage.seconds([(chunk + more, context, False)]) >= seconds * (1 - 1e-12)
        assert stage.seconds([(chunk, context + more, False)]) >= seconds * (1 - 1e-12)
        assert stage.seconds([(chunk, context, True)]) >= seconds
        assert stage.seconds([(chunk, context, False), (1, 0, False)]) >= seconds * (1 - 1e-12)


def test_rounds_are_summed_per_stage() -> None:
    first = StageCost(token_count=(0, 100), token_seconds=(0.0, 1.0), round_overhead_s=0.1)
    last = StageCost(token_count=(0, 100), token_seconds=(0.0, 2.0), attention=PairAttention(pair_s=1e-3))
    model = CostModel(stages=(first, last))
    seconds = model.round_seconds(
        np.array([0, 0, 1]), np.array([10, 20, 5]), np.array([0, 7, 27]), np.array([True, False, True])
    )
    expected = [
        [stage.seconds(chunks) for stage in (first, last)]
        for chunks in ([(10, 0, True), (20, 7, False)], [(5, 27, True)])
    ]
    assert seconds == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "isochunk.cost-model/3"}, "schema: isochunk.cost-model/3; isochunk.cost-model/1"),
        ({"stages": []}, "stages: 0 entries; at least one stage"),
        ({"return_s": -1.0}, "return_s: -1.0; a finite number of seconds, at least 0"),
        ({"return_s": "soon"}, "return_s: soon; a number is needed"),
        ({"hop": {"latency_s": math.nan}}, "hop.latency_s: nan"),
        ({"hop": {"token_s": -1.0}}, "hop.token_s: -1.0"),
        ({"return_s": 1e308}, "return_s: 1e+308; a finite number of seconds, at least 0 and at most 1e+09"),
        ({"return_s": 10**400}, "return_s: inf; a finite number"),
    ],
)
def test_bad_files_are_refused_by_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        CostModel.from_json(DESIGN | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round_overhead_s": -0.1}, "stages[0].round_overhead_s: -0.1"),
        (
            {"tokens": {"count": [0, 10, 20], "seconds": [0, 2, 1]}},
            "stages[0].tokens.seconds[2]: 1.0; time may not fall",
        ),
        ({"tokens": {"count": [0, 10, 10], "seconds": [0, 1, 2]}}, "stages[0].tokens.count[2]: 10"),
        ({"tokens": {"count": [0, 10], "seconds": [0]}}, "stages[0].tokens.seconds: 1 values"),
        ({"tokens": {"count": [0, 1.5], "seconds": [0, 1]}}, "stages[0].tokens.count[1]: 1.5; a whole number"),
        ({"tokens": None}, "stages[0].tokens: missing"),
        ({"attention": {"pair_s": -1e-9}}, "stages[0].attention.pair_s: -1e-09"),
        (
            {"attention": {"count": [1], "base_s": [1], "context_s": [math.inf]}},
            "stages[0].attention.context_s[0]: inf",
        ),
        (
            {"attention": {"count": [1, 2], "base_s": [2, 1], "context_s": [0, 0]}},
            "attention.base_s[1]: 1.0; time may not",
        ),
        ({"chunk_s": True}, "stages[0].chunk_s: True; a number"),
        ({"tokens": {"count": [0, 10**400], "seconds": [0, 1]}}, "stages[0].tokens.count[1]: inf; a whole number"),
        ({"tokens": {"count": [0, 2**41], "seconds": [0, 1]}}, "stages[0].tokens.count[1]: 2199023255552; at most"),
        ({"attention": {"pair_s": 1e300}}, "stages[0].attention.pair_s: 1e+300; "),
    ],
)
def test_bad_stages_are_refused_by_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        CostModel.from_json(DESIGN | {"stages": [DESIGN["stages"][0] | change]})
    assert message in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_cost_model(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="must be JSON"):
        load_cost_model(tmp_path / "broken.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="must be JSON nested at most 64 deep"):
        load_cost_model(tmp_path / "deep.json")


def test_unknown_fields_are_ignored() -> None:
    assert CostModel.from_json(json.loads(json.dumps(DESIGN | {"note": "measured"}))) == CostModel.from_json(DESIGN)


def test_groups_of_a_stage_add_up_and_are_written_in_schema_2() -> None:
    groups = tuple(
        StageCost(
            token_count=(0, 100 * k, 1000),
            token_seconds=(0.0, 0.1, 0.3 * k),
            attention=PairAttention(pair_s=1e-9 * k),
            round_overhead_s=0.01 * k,
        )
        for k in (1, 2, 3, 4)
    )
    cost = CostModel(stages=groups, virtual_stages=2, stage_order=StageOrder.V, hop_latency_s=0.1)
    assert cost.pp_size == 2 and cost.stage_of_group == (0, 1, 1, 0)
    assert CostModel.from_json(json.loads(json.dumps(cost.to_json()))) == cost
    merged = cost.merged()
    for tokens in (1, 50, 150, 350, 1000, 5000):
        chunks = [(tokens, 70, True)]
        each = [group.seconds(chunks) for group in groups]
        assert merged.stages[0].seconds(chunks) == pytest.approx(each[0] + each[3])
        assert merged.stages[1].seconds(chunks) == pytest.approx(each[1] + each[2])
    with pytest.raises(UserError, match="multiple of virtual_stages"):
        CostModel(stages=groups[:3], virtual_stages=2)
