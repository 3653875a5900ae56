"""Plans and jobs that several tests share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from profiler.comm.links.group import Groups, RankGroup
from profiler.kernels.attention import available_kernels
from profiler.model import load_model_shape
from runtime.job.job import RunJob
from tuner.plan.attention_kernels import AttentionKernels
from tuner.plan.plan import Chunk, Parallel, Plan, Request, Round

CPU_KERNEL = available_kernels(torch.device("cpu"), torch.float32)[0]
LENGTHS = (202, 97)
# Chunks of 100, 1, 37 and 64 tokens, two requests interleaved, rounds with one and with both.
INTERLEAVED: tuple[Round, ...] = (
    (Chunk(0, 0, 100),),
    (Chunk(1, 0, 60), Chunk(0, 100, 1)),
    (Chunk(0, 101, 37),),
    (Chunk(0, 138, 64), Chunk(1, 60, 37)),
)
ALONE = Groups(
    tensor=RankGroup(),
    sequence=RankGroup(),
    sequence_ranks=(0,),
    inbound={},
    outbound={},
    hand_offs=(),
    back=None,
    everyone=None,
    sharing=None,
)  # type: ignore[arg-type]  # only passes wait on it
PARTITIONS = {1: (5,), 2: (2, 3), 3: (1, 3, 1)}


def requests(*lengths: int, **fields: Any) -> tuple[Request, ...]:
    return tuple(Request(id=f"r{index}", prompt_tokens=length, **fields) for index, length in enumerate(lengths))


def prompts(*lengths: int, vocab_size: int = 211) -> tuple[tuple[int, ...], ...]:
    source = random.Random(7)
    return tuple(tuple(source.choices(range(vocab_size), k=length)) for length in lengths)


def make_job(weights: Path, *, tp_size: int = 1, pp_size: int = 2, **fields: Any) -> RunJob:
    defaults: dict[str, Any] = {
        "shape": load_model_shape(str(weights)),
        "parallel": Parallel(tp_size=tp_size, pp_size=pp_size, layer_partition=PARTITIONS[pp_size]),
        "requests": requests(*LENGTHS),
        "rounds": INTERLEAVED,
        "window": None,
        "prompts": prompts(*LENGTHS),
        "weights": weights,
        "dtype": "float32",
        "max_new_tokens": 1,
        "repeat": 1,
        "kernels": AttentionKernels(usual=CPU_KERNEL),
    }
    return RunJob(**defaults | fields)


def make_plan(weights: Path, *, tp_size: int = 1, pp_size: int = 2, **fields: Any) -> Plan:
    defaults: dict[str, Any] = {
        "model": dict(load_model_shape(str(weights)).config),
        "precision": "float32",
        "parallel": Parallel(tp_size=tp_size, pp_size=pp_size, layer_partition=PARTITIONS[pp_size]),
        "requests": requests(*LENGTHS),
        "rounds": INTERLEAVED,
    }
    return Plan(**defaults | fields)
