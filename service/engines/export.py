"""A plan for an engine: the files to launch it with, what it cannot express, and what that costs by prediction."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from db.errors import UserError
from db.files.replacement import replace_file
from service.engines.rules import ChunkTable, Ruled, best_dynamic_chunk, best_fixed_chunk, by_table, problem_of
from tuner.plan.plan import Plan
from tuner.rounds.problem import Problem

_MODEL = '"${MODEL:?set MODEL to the folder or name of the model}"'


class Engine(StrEnum):
    """Engines that a plan can be written for, each in the release whose flags are meant."""

    SGLANG = "sglang"
    VLLM = "vllm"
    VLLM_ASCEND = "vllm-ascend"
    TRTLLM = "trtllm"
    DYNAMO = "dynamo"

    @property
    def release(self) -> str:
        """The release that this was written for."""
        return {"sglang": "0.5.23", "vllm": "0.33.0", "vllm-ascend": "0.33", "trtllm": "1.x", "dynamo": "v1beta1"}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What an engine is launched with."""

    engine: Engine
    release: str
    flags: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(repr=False)
    """By name; `plan.json` is the plan itself."""
    cannot: tuple[str, ...]
    """What the engine cannot express, a sentence each."""
    plan_makespan_s: float
    ruled: tuple[Ruled, ...]
    """What the engine makes of the batch, by prediction."""


def export(plan: Plan, engine: Engine) -> Export:
    """The plan for an engine. Raises UserError for a plan without a cost model and for a layout that it cannot run."""
    problem = problem_of(plan)
    if plan.parallel.virtual_stages > 1:
        raise UserError(
            "engine", engine, f"holds one group of layers a stage; the plan asks for {plan.parallel.virtual_stages}"
        )
    if plan.parallel.sp_size > 1 and engine in (Engine.TRTLLM, Engine.DYNAMO):
        raise UserError(
            "engine",
            engine,
            f"has no prefill with sequence parallelism, which the plan asks for ({plan.parallel.sp_size})",
        )
    return _WRITERS[engine](plan, problem)


def write(made: Export, folder: Path) -> list[Path]:
    """Write the files into a folder, which is made if its parent is there -> their paths."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError("-o", folder, f"must be a folder, or a name in one ({error.strerror})") from None
    written = []
    for name, text in made.files.items():
        path = folder / name
        replace_file(path, text.encode())
        if name.endswith(".sh"):
            path.chmod(0o755)
        written.append(path)
    return written


def _sglang(plan: Plan, problem: Problem) -> Export:
    parallel, table = plan.parallel, ChunkTable.of(plan)
    own, planned = best_dynamic_chunk(problem, "sglang"), by_table(problem, table)
    flags = [
        f"--tp-size={parallel.tp_size}",
        f"--pp-size={parallel.pp_size}",
        f"--chunked-prefill-size={table.first}",
        f"--max-prefill-tokens={max(table.sizes)}",
        "--schedule-policy=fcfs",
    ]
    environment = {"SGLANG_PLUGINS": "isochunk", "ISOCHUNK_PLAN": "plan.json"}
    if parallel.pp_size > 1:
        flags.append("--enable-dynamic-chunking")
        environment |= _partition(plan, "SGLANG_PP_LAYER_PARTITION")
    if parallel.sp_size > 1:
        flags += [f"--attn-cp-size={parallel.sp_size}", "--enable-prefill-cp"]
    cannot = [
        "Rounds that hold unfinished chunks of several requests: SGLang has one partial request at a time.",
        "The first chunk of a request by its place in the batch: it is the flag's size.",
        *_common(plan),
    ]
    if parallel.pp_size == 1:
        cannot.append(
            "Chunk sizes that change: SGLang sizes chunks on pipelines alone, so that one stage takes the flag's."
        )
    return _made(
        Engine.SGLANG, plan, flags, environment, "python -m sglang.launch_server --model-path", cannot, (planned, own)
    )


def _vllm(plan: Plan, problem: Problem) -> Export:
    own = best_fixed_chunk(problem)
    largest = max(sum(chunk.tokens for chunk in chunks) for chunks in plan.rounds)
    makespan_s = problem.evaluate(plan.rounds).makespan_s
    flags = [
        *_vllm_sizes(plan),
        "--scheduler-cls=service.engines.vllm_scheduler.PlannedScheduler",
        "--async-scheduling",
        # A round and a token of each request that decodes beside it.
        f"--max-num-batched-tokens={largest + len(plan.requests)}",
        f"--max-num-seqs={max(8, len(plan.requests))}",
    ]
    cannot = [
        "A batch that comes bit by bit: a round begins with the requests of it that are there.",
        "The plan's rounds without isochunk installed beside it: then one token budget serves every step.",
        *_common(plan),
    ]
    environment = {"ISOCHUNK_PLAN": "plan.json"} | _vllm_environment(plan)
    planned = Ruled(rule="the plan's rounds", chunk=largest, makespan_s=makespan_s)
    return _made(Engine.VLLM, plan, flags, environment, "vllm serve", cannot, (planned, own))


def _vllm_ascend(plan: Plan, problem: Problem) -> Export:
    own = best_dynamic_chunk(problem, "ascend")
    config = {
        "scheduler_config": {
            "profiling_chunk_config": {
                "enabled": True, "smooth_factor": 1.0, "min_chunk": min(4096, own.chunk), "need_timing": True,
                "max_fit_chunk": 30,
            }
        }
    }  # fmt: skip
    flags = [
        *_vllm_sizes(plan),
        f"--max-num-batched-tokens={own.chunk}",
        f"--additional-config={json.dumps(config, separators=(',', ':'))}",
        "--no-async-scheduling",
    ]
    cannot = [
        "Rounds as planned: its own profile sizes the chunks from the base that suits this batch best.",
        *_common(plan),
    ]
    return _made(Engine.VLLM_ASCEND, plan, flags, _vllm_environment(plan), "vllm serve", cannot, (own,))


def _trtllm(plan: Plan, problem: Problem) -> Export:
    parallel, fixed = plan.parallel, best_fixed_chunk(problem)
    lines = [
        f"tensor_parallel_size: {parallel.tp_size}",
        f"pipeline_parallel_size: {parallel.pp_size}",
        "enable_chunked_prefill: true",
        f"max_num_tokens: {fixed.chunk}",
        f"max_batch_size: {len(plan.requests)}",
    ]
    cannot = ["Rounds of different sizes: one token budget serves every step.", *_common(plan)]
    if len(set(parallel.layer_partition)) > 1:
        cannot.append(
            f"The layers of each stage ({'-'.join(map(str, parallel.layer_partition))}): it shares them out evenly."
        )
    made = _made(Engine.TRTLLM, plan, ["--config=config.yaml"], {}, "trtllm-serve", cannot, (fixed,))
    return _with_file(made, "config.yaml", "\n".join(lines) + "\n")


def _dynamo(plan: Plan, problem: Problem) -> Export:
    inner = _sglang(plan, problem)
    words = ["python3", "-m", "dynamo.sglang", "--model-path=$(MODEL)", *inner.flags]
    container = {
        "name": "main",
        "command": words[:1],
        "args": words[1:],
        "env": [{"name": name, "value": value} for name, value in inner.environment.items()],
    }
    content = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "isochunk-prefill"},
        "spec": {
            "components": [
                {
                    "name": "Prefill",
                    "type": "prefill",
                    "replicas": 1,
                    "podTemplate": {"spec": {"containers": [container]}},
                }
            ]
        },
    }
    made = Export(
        engine=Engine.DYNAMO,
        release=Engine.DYNAMO.release,
        flags=inner.flags,
        environment=inner.environment,
        files={"plan.json": inner.files["plan.json"]},
        cannot=(*inner.cannot, "Where plan.json lies in the container: mount it, and name it in ISOCHUNK_PLAN."),
        plan_makespan_s=inner.plan_makespan_s,
        ruled=inner.ruled,
    )
    # JSON is YAML: no library is needed to write it.
    return _with_file(made, "graph.yaml", json.dumps(content, indent=2) + "\n")


_WRITERS: dict[Engine, Callable[[Plan, Problem], Export]] = {
    Engine.SGLANG: _sglang,
    Engine.VLLM: _vllm,
    Engine.VLLM_ASCEND: _vllm_ascend,
    Engine.TRTLLM: _trtllm,
    Engine.DYNAMO: _dynamo,
}


def _vllm_sizes(plan: Plan) -> list[str]:
    parallel = plan.parallel
    flags = [f"--tensor-parallel-size={parallel.tp_size}", f"--pipeline-parallel-size={parallel.pp_size}"]
    return flags + ([f"--prefill-context-parallel-size={parallel.sp_size}"] if parallel.sp_size > 1 else [])


def _vllm_environment(plan: Plan) -> dict[str, str]:
    return _partition(plan, "VLLM_PP_LAYER_PARTITION") if plan.parallel.pp_size > 1 else {}


def _partition(plan: Plan, variable: str) -> dict[str, str]:
    """The layers of each stage, where the plan is of a model: one made from a cost model alone does not know them."""
    return {variable: ",".join(map(str, plan.parallel.layer_partition))} if plan.model else {}


def _common(plan: Plan) -> list[str]:
    """What no engine expresses."""
    found = []
    if not plan.model and plan.parallel.pp_size > 1:
        found.append("The layers of each stage: the plan was made from a cost model and names no model.")
    if plan.window is not None:
        found.append(f"A window of {plan.window} rounds: engines keep as many in flight as they have stages.")
    return found


def _made(
    engine: Engine,
    plan: Plan,
    flags: list[str],
    environment: dict[str, str],
    command: str,
    cannot: list[str],
    ruled: tuple[Ruled, ...],
) -> Export:
    exports = [f"export {name}={_place(value)}" for name, value in environment.items()]
    words = " \\\n  ".join([f"exec {command} {_MODEL}", *map(shlex.quote, flags), '"$@"'])
    script = "\n".join(
        ["#!/bin/sh", f"# {engine} {engine.release}, from an isochunk plan. Further flags may follow.", "set -eu",
         'cd "$(dirname "$0")"', *exports, words, ""]
    )  # fmt: skip
    predicted = (
        plan.predicted.makespan_s if plan.predicted is not None else problem_of(plan).evaluate(plan.rounds).makespan_s
    )
    return Export(
        engine=engine,
        release=engine.release,
        flags=tuple(flags),
        environment=environment,
        files={"launch.sh": script, "plan.json": json.dumps(plan.to_json(), indent=2) + "\n"},
        cannot=tuple(cannot),
        plan_makespan_s=predicted,
        ruled=ruled,
    )


def _with_file(made: Export, name: str, text: str) -> Export:
    from dataclasses import replace

    return replace(made, files={**made.files, name: text})


def _place(value: str) -> str:
    """A value for the shell; a file of ours lies beside the script."""
    return f'"$PWD/{value}"' if value == "plan.json" else shlex.quote(value)


def export_json(made: Export) -> dict[str, Any]:
    """For programs."""
    return {
        "engine": made.engine.value,
        "release": made.release,
        "flags": list(made.flags),
        "environment": made.environment,
        "files": made.files,
        "cannot": list(made.cannot),
        "plan_makespan_s": made.plan_makespan_s,
        "ruled": [{"rule": one.rule, "chunk": one.chunk, "makespan_s": one.makespan_s} for one in made.ruled],
    }
