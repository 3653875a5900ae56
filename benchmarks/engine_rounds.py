"""Feeds the requests of plans to vLLM's own V1 scheduler with our class, on a CPU, and counts the rounds it keeps.

    python -m venv engine && engine/bin/pip install -e . vllm==0.33.0
    engine/bin/python -m benchmarks.engine_rounds [--plans 20]

Nothing of the engine runs but its scheduler, its KV block manager and its configuration: each step's output goes to
have been computed, and requests end with their first token. Without the heavy dependencies `pip install --no-deps
vllm==0.33.0` and what its imports ask for is enough. Prints a row a plan; exit code 1 below 99 %.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.demo_model import write_demo_model
from service.cli.output import print_table
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Parallel, Plan, Request, save_plan
from tuner.plan.stage_cost import PairAttention, StageCost
from tuner.rounds.round_plan import rounds_to_plan
from tuner.search.planner import plan_rounds

_LEAST = 0.99
_MODEL_LENGTH = 131072
_BLOCK = 16


def main(num_plans: int) -> int:
    """Print what was kept -> the exit code."""
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms.current_platform = CpuPlatform()
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(prefix="rounds-") as folder:
        model = Path(folder) / "model"
        write_demo_model(model)
        for seed in range(num_plans):
            plan = some_plan(seed)
            path = Path(folder) / "plan.json"
            save_plan(path, plan)
            os.environ["ISOCHUNK_PLAN"] = str(path)
            steps = _steps(plan, _scheduler(plan, model))
            rows.append(
                (seed, plan.parallel.pp_size, len(plan.requests), len(plan.rounds), len(steps), _kept(plan, steps))
            )
    share = sum(int(str(row[5])) for row in rows) / sum(int(str(row[3])) for row in rows)
    print_table(("plan", "stages", "requests", "rounds", "steps", "as planned"), rows)
    print(f"{share:.2%} of the rounds as planned")
    return 0 if share >= _LEAST else 1


def _kept(plan: Plan, steps: list[dict[str, int]]) -> int:
    """How many rounds are a step with just their chunks."""
    wanted = [{plan.requests[chunk.request].id: chunk.tokens for chunk in chunks} for chunks in plan.rounds]
    return sum(one == other for one, other in zip(wanted, steps, strict=False))


def _steps(plan: Plan, scheduler: Any) -> list[dict[str, int]]:
    """What each step schedules: tokens by request. As many steps are in flight as there are stages."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request as EngineRequest

    for number, request in enumerate(plan.requests):
        # Tokens that no other request has, so that nothing of it is found in the prefix cache.
        ids = [1 + (number * 7919 + index) % 250 for index in range(request.prompt_tokens)]
        ids[:2] = [number % 250 + 1, number // 250 + 1]
        scheduler.add_request(
            EngineRequest(
                request_id=request.id,
                prompt_token_ids=ids,
                sampling_params=SamplingParams(max_tokens=1, ignore_eos=True),
                pooling_params=None,
            )
        )
    steps: list[dict[str, int]] = []
    flying: list[Any] = []
    while scheduler.has_requests() and len(steps) < 10 * len(plan.rounds):
        output = scheduler.schedule()
        if output.num_scheduled_tokens:
            steps.append(dict(output.num_scheduled_tokens))
            flying.append(output)
        if len(flying) >= plan.parallel.pp_size or not output.num_scheduled_tokens:
            done = flying.pop(0) if flying else output
            names = list(done.num_scheduled_tokens)
            ended = [[7] if _is_through(scheduler, name, done) else [] for name in names]
            output = ModelRunnerOutput(
                req_ids=names, req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=ended,
            )  # fmt: skip
            scheduler.update_from_output(done, output)
    return steps


def _is_through(scheduler: Any, name: str, output: Any) -> bool:
    """Whether a step ran the last of a request's prompt."""
    request = scheduler.requests[name]
    started = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    started |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return bool(started[name] + output.num_scheduled_tokens[name] >= request.num_prompt_tokens)


def _scheduler(plan: Plan, model: Path) -> Any:
    import torch
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from service.engines.plan_steps import PlanSteps
    from service.engines.vllm_scheduler import PlannedScheduler

    num_blocks = sum(-(-request.prompt_tokens // _BLOCK) + 2 for request in plan.requests) + 16
    cache = CacheConfig(block_size=_BLOCK, gpu_memory_utilization=0.9, enable_prefix_caching=True)
    config = VllmConfig(
        scheduler_config=SchedulerConfig(
            max_num_seqs=max(8, len(plan.requests)),
            max_num_batched_tokens=PlanSteps(plan).most_tokens + len(plan.requests),
            max_model_len=_MODEL_LENGTH,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=True,
        ),
        model_config=ModelConfig(
            model=str(model), dtype="float32", seed=0, max_model_len=_MODEL_LENGTH, skip_tokenizer_init=True,
            hf_overrides={"max_position_embeddings": _MODEL_LENGTH},
        ),
        cache_config=cache,
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
    )  # fmt: skip
    cache.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=_BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return PlannedScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        block_size=_BLOCK,
        log_stats=False,
        structured_output_manager=StructuredOutputManager(config),
    )


def some_plan(seed: int, **options: Any) -> Plan:
    """A batch of up to a dozen prompts on up to eight stages, planned."""
    draw = random.Random(seed)
    pp_size = draw.choice((1, 2, 4, 8))
    stage = StageCost(
        token_count=(0, 65536),
        token_seconds=(0.0, 0.4),
        round_overhead_s=draw.choice((0.004, 0.04)),
        attention=PairAttention(pair_s=6.5e-10),
    )
    cost = CostModel(stages=(stage,) * pp_size)
    requests = tuple(
        Request(id=f"r{index}", prompt_tokens=draw.randrange(100, 60_000)) for index in range(draw.randint(1, 12))
    )
    return rounds_to_plan(
        plan_rounds(cost, requests, **options),
        requests=requests,
        model={"name": "any"},
        precision="bfloat16",
        parallel=Parallel(tp_size=1, pp_size=pp_size, layer_partition=(4,) * pp_size),
        window=None,
        cost_model=cost.to_json(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=20)
    sys.exit(main(parser.parse_args().plans))
