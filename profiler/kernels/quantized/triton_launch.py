"""How Triton kernels are launched: with the block sizes that were fastest, and for few rows early.

A step of decode is some three hundred short kernels, each launched when the last program of the one before has ended.
Launched early (programmatic dependent launch, Hopper and later), its programs take their places meanwhile and wait
there. A kernel may do so if `begin` stands before its first access to memory.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TUNING_MS = (10, 40)  # of warm-up and of measuring, for each choice of block sizes
MOST_ROWS = 4  # more rows keep a card busy by themselves
_HOPPER = (9, 0)


def suiting(configs: list[triton.Config], named: dict[str, int], **_kwargs: object) -> list[triton.Config]:
    """Those whose blocks suit so many rows: neither mostly empty nor many where few would do."""
    bucket = named["bucket"]
    least, most = (64, 256) if bucket > 128 else (16, max(16, bucket))
    return [config for config in configs if least <= config.kwargs["BLOCK_M"] <= most] or configs


def tuned(configs: list[triton.Config], key: list[str], *, suits: Any = suiting) -> Any:
    """Decorates a kernel that measures its block sizes once for each `key`; interpreted, it takes the last ones."""
    if INTERPRETED:  # there is no card to measure on
        return triton.heuristics({name: _always(value) for name, value in configs[-1].kwargs.items()})
    prune = {"early_config_prune": suits} if suits else None
    return triton.autotune(configs=configs, key=key, prune_configs_by=prune, do_bench=_measured)


def _measured(call: Callable[[], object], quantiles: tuple[float, ...]) -> Any:
    warmup_ms, measure_ms = _TUNING_MS
    return triton.testing.do_bench(call, warmup=warmup_ms, rep=measure_ms, quantiles=quantiles)


def _always(value: int) -> Callable[[object], int]:
    return lambda _arguments: value


def early(num_rows: int) -> dict[str, bool]:
    """What a launch for so many rows is told: the constant EARLY, and how to launch."""
    starts_early = num_rows <= MOST_ROWS and not INTERPRETED and _has_early_start()
    return {"EARLY": True, "launch_pdl": True} if starts_early else {"EARLY": False}


@cache
def _has_early_start() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= _HOPPER


@triton.jit
def begin(EARLY: tl.constexpr):
    """Wait for the kernel before, and let the next one start."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # before the wait was slower: programs of many kernels crowd the card
