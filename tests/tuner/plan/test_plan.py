import copy
from pathlib import Path
from typing import Any

import pytest

from db.errors import UserError
from profiler.kernels.attention_kernel import AttentionKernel
from tuner.plan.attention_kernels import AttentionKernels
from tuner.plan.plan import Chunk, Parallel, Plan, Predicted, Request, check_rounds, load_plan, save_plan

KERNELS = AttentionKernels(usual=AttentionKernel.CPU_FOLDED, others={AttentionKernel.CPU_FLASH: ((10, 0),)})
FILE: dict[str, Any] = {
    "schema": "isochunk.plan/1",
    "model": {"name": "tiny"},
    "precision": "bfloat16",
    "parallel": {"tp_size": 1, "pp_size": 2, "layer_partition": [3, 1]},
    "requests": [{"id": "a", "prompt_tokens": 100, "cached_tokens": 20}, {"id": "b", "prompt_tokens": 30}],
    "rounds": [
        [{"request": 0, "start": 20, "tokens": 50}],
        [{"request": 1, "start": 0, "tokens": 30}, {"request": 0, "start": 70, "tokens": 30}],
    ],
}


def test_a_hand_written_plan_reads() -> None:
    plan = Plan.from_json(FILE)
    assert plan.window is None
    assert plan.requests[1].arrival_s == 0.0
    assert plan.rounds[1] == (Chunk(1, 0, 30), Chunk(0, 70, 30))
    assert plan.parallel == Parallel(tp_size=1, pp_size=2, layer_partition=(3, 1))


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = Plan(
        model={"name": "tiny"},
        precision="float32",
        parallel=Parallel(tp_size=2, pp_size=1, layer_partition=(4,)),
        requests=(Request(id="a", prompt_tokens=10, weight=2.0, sla_ttft_s=1.5, arrival_s=3.0),),
        rounds=((Chunk(0, 0, 10),),),
        window=3,
        predicted=Predicted(
            makespan_s=1.0,
            lower_bound_s=0.9,
            gap=0.11,
            ttft_s=(1.0,),
            planning_s=0.01,
            round_s=((1.0,),),
            uncertainty=0.05,
        ),
        policy="joint",
        cost_model={"schema": "isochunk.cost-model/1"},
        attention_kernels=KERNELS,
    )
    save_plan(tmp_path / "plan.json", plan)
    assert load_plan(tmp_path / "plan.json") == plan
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_kernels_run_as_named_where_they_are_available() -> None:
    flash, folded, sdpa = AttentionKernel.CPU_FLASH, AttentionKernel.CPU_FOLDED, AttentionKernel.SDPA
    assert [KERNELS(10, 0), KERNELS(10, 5), KERNELS(7, 0)] == [flash, folded, folded]
    assert KERNELS.among([sdpa, folded]) == AttentionKernels(usual=folded)
    assert KERNELS.among([sdpa, flash]) == AttentionKernels(usual=sdpa, others={flash: ((10, 0),)})


@pytest.mark.parametrize("version", [1, 2, 3])
def test_kernels_are_read_from_files_that_have_them(version: int) -> None:
    content = FILE | {"schema": f"isochunk.plan/{version}", "attention_kernels": KERNELS.to_json()}
    assert Plan.from_json(content).attention_kernels == (KERNELS if version == 3 else None)


def test_bad_kernels_are_refused_by_field() -> None:
    content = FILE | {"schema": "isochunk.plan/3"}
    for kernels, message in (
        ({"usual": "flash9"}, "attention_kernels.usual: flash9; "),
        ({"usual": "sdpa", "others": {"sdpa": [[0, 5]]}}, r"attention_kernels.others.sdpa\[0\]: \[0, 5\]; \[tokens"),
        ({"usual": "sdpa", "others": {"sdpa": [[1]]}}, r"attention_kernels.others.sdpa\[0\]"),
    ):
        with pytest.raises(UserError, match=message):
            Plan.from_json(content | {"attention_kernels": kernels})


def test_extra_fields_are_written_and_ignored(tmp_path: Path) -> None:
    plan = Plan.from_json(FILE | {"note": 1, "predicted": {"makespan_s": 2.0, "more": 3}})
    assert plan.predicted is not None
    assert plan.predicted.makespan_s == 2.0


CASES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("rounds", 1, 1, "start"), 71, "rounds[1][1].start: 71; 70, the next token of request 0"),
    (("rounds", 1, 1, "start"), 60, "rounds[1][1].start: 60; 70"),
    (("rounds", 0, 0, "start"), 0, "rounds[0][0].start: 0; 20"),
    (("rounds", 1, 1, "tokens"), 31, "rounds[1][1].tokens: 31; 1 to 30, what request 0 has left"),
    (
        ("rounds", 1, 1, "tokens"),
        29,
        "requests[0].prompt_tokens: 100; all tokens up to 100 must run (the rounds stop at 99)",
    ),
    (("rounds", 1, 0, "tokens"), 0, "rounds[1][0].tokens: 0; at least 1"),
    (("rounds", 1, 0, "request"), 2, "rounds[1][0].request: 2; 0 to 1"),
    (("rounds", 1, 0, "request"), -1, "rounds[1][0].request: -1; 0 to 1"),
    (("rounds", 1, 0, "request"), 0, "rounds[1][0].start: 0; 70"),
    (("rounds", 0), [], "rounds[0]: []; at least one chunk"),
    (("rounds", 0, 0, "tokens"), "x", "rounds[0][0].tokens: x; a whole number"),
    (("schema",), "isochunk.plan/4", "schema: isochunk.plan/4; isochunk.plan/3 or isochunk.plan/2 or isochunk.plan/1"),
    (
        ("parallel", "layer_partition"),
        [4],
        "parallel.layer_partition: [4]; one number of layers a stage (pp_size is 2)",
    ),
    (("parallel", "layer_partition"), [4, 0], "parallel.layer_partition: [4, 0]; at least one layer a stage"),
    (("parallel", "tp_size"), 0, "parallel.tp_size: 0; at least 1"),
    (("requests",), [], "requests: []; at least one request"),
    (("requests", 0, "prompt_tokens"), 0, "requests[0].prompt_tokens: 0; at least 1"),
    (("requests", 0, "cached_tokens"), 100, "requests[0].cached_tokens: 100; 0 to 99"),
    (("requests", 0, "arrival_s"), float("nan"), "requests[0].arrival_s: nan"),
    (("requests", 0, "arrival_s"), 10**400, "requests[0].arrival_s: inf; a finite number"),
    (("requests", 0, "arrival_s"), 1e10, "requests[0].arrival_s: 10000000000.0; a finite number of seconds"),
    (("requests", 0, "prompt_tokens"), 10**15, f"requests[0].prompt_tokens: 1{'0' * 15}; at most {2**40}"),
    (("rounds", 0, 0, "tokens"), 10**400, "rounds[0][0].tokens: 1000"),
    (("predicted",), {"makespan_s": 0}, "predicted.makespan_s: 0.0; seconds above 0"),
    (("predicted",), {"makespan_s": float("nan")}, "predicted.makespan_s: nan; seconds above 0"),
    (("predicted",), {"makespan_s": 1, "ttft_s": [1.0]}, "predicted.ttft_s: 1 values; one for each of 2 requests"),
    (("window",), 0, "window: 0; at least 1"),
    (("precision",), None, "precision: missing"),
]


@pytest.mark.parametrize(("where", "value", "message"), CASES, ids=[str(case[0]) + str(case[1])[:40] for case in CASES])
def test_bad_plans_are_refused_by_field(where: tuple[Any, ...], value: Any, message: str) -> None:
    data = copy.deepcopy(FILE)
    entry: Any = data
    for key in where[:-1]:
        entry = entry[key]
    entry[where[-1]] = value
    with pytest.raises(UserError) as error:
        Plan.from_json(data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_two_chunks_of_a_request_in_a_round_are_refused() -> None:
    request = Request(id="a", prompt_tokens=10)
    with pytest.raises(UserError, match=r"rounds\[0\]\[1\].request: 0; at most one chunk of each request"):
        check_rounds([request], [(Chunk(0, 0, 5), Chunk(0, 5, 5))])
