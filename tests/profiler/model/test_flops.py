"""FLOPs of a prefill."""

from __future__ import annotations

import pytest

from profiler.model import load_model_shape
from profiler.model.flops import prefill_flops


@pytest.mark.parametrize(("num_tokens", "flops"), [(8192, 1.319e14), (32768, 7.389e14), (131072, 6.333e15)])
def test_flops_of_a_prefill_do_not_depend_on_its_chunks(num_tokens: int, flops: float) -> None:
    shape = load_model_shape("llama-3-8b")
    whole = prefill_flops(shape, [(num_tokens, 0)], 1)
    cut = prefill_flops(shape, [(1000, 0), (3096, 1000), (num_tokens - 4096, 4096)], 1)
    assert whole == cut
    assert whole == pytest.approx(flops, rel=5e-4)
