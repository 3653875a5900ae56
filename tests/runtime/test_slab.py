"""The KV slab holds each request's rows once, and is as large as the memory check counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from profiler.model import load_model_shape
from runtime.slab import KVSlab
from tests.runtime.cases import make_plan, requests
from tuner.memory import plan_memory


@pytest.mark.parametrize(("variant", "tp_size"), [("llama", 1), ("llama", 2), ("llama", 4), ("qwen3", 2)])
def test_the_slab_is_as_large_as_counted(variant: str, tp_size: int, checkpoint: Callable[[str], Path]) -> None:
    plan = make_plan(checkpoint(variant), tp_size=tp_size, pp_size=2)
    shape = load_model_shape(str(checkpoint(variant)))
    counted = plan_memory(shape, plan, max_new_tokens=3, device_type="cpu")
    for stage, num_layers in enumerate(plan.parallel.layer_partition):
        slab = KVSlab(
            shape, plan.requests, num_layers=num_layers, tp_size=tp_size, max_new_tokens=3,
            device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip
        assert slab.keys.nbytes + slab.values.nbytes == counted[stage].kv_bytes


def test_requests_do_not_share_rows(checkpoint: Callable[[str], Path]) -> None:
    shape = load_model_shape(str(checkpoint("llama")))
    slab = KVSlab(
        shape, requests(5, 9, 2), num_layers=1, tp_size=1, max_new_tokens=2,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    assert slab.start == (0, 7, 18)
    keys, values = slab[0]
    assert keys.shape == values.shape == (2, 22, 16)
