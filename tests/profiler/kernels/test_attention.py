"""Every kernel that a CPU offers gives the attention that the causal mask defines."""

from __future__ import annotations

import pytest
import torch

from profiler.kernels.attention import attend, attend_tokens, attends_on_device, available_kernels
from profiler.kernels.attention_kernel import AttentionKernel

CPU = torch.device("cpu")
KERNELS = available_kernels(CPU, torch.float32)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """By its definition, in float64."""
    group, context = q.shape[0] // k.shape[0], k.shape[1] - q.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[2] ** 0.5
    unseen = torch.ones(scores.shape[1:], dtype=torch.bool).triu(context + 1)
    return scores.masked_fill(unseen, -torch.inf).softmax(dim=-1) @ v


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2)])
# Single tokens, chunks within a strip, across strips, and of several blocks of uneven lengths.
@pytest.mark.parametrize(("chunk", "context"), [(1, 0), (1, 70), (37, 0), (64, 1), (100, 333), (1301, 0), (800, 200)])
def test_attention_is_causal(
    kernel: AttentionKernel, num_heads: int, num_kv_heads: int, chunk: int, context: int
) -> None:
    torch.manual_seed(0)
    # As a layer gives them: q is [c, H, D], the slab has rows beyond the ones seen. Scores of some size.
    q = torch.randn(chunk, num_heads, 32).transpose(0, 1) * 3
    keys, values = torch.randn(2, num_kv_heads, context + chunk + 9, 32)
    k, v = keys[:, : context + chunk], values[:, : context + chunk]
    with torch.inference_mode():
        found = attend(kernel, q, k, v)
    assert found.shape == q.shape
    torch.testing.assert_close(found.double(), causal_attention(q, k, v), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 32), (6, 2, 24), (5, 1, 64)])
def test_one_token_of_each_request_sees_its_own_rows(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    torch.manual_seed(0)
    # Out of order, with rows between that belong to nobody.
    starts, lengths = torch.tensor([90, 3, 60, 300]), torch.tensor([200, 57, 1, 33])
    q = torch.randn(4, num_heads, head_dim) * 3
    keys, values = torch.randn(2, num_kv_heads, 350, head_dim)
    rows = torch.arange(350)
    seen = (rows >= starts[:, None]) & (rows < (starts + lengths)[:, None])
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None].double(), keys.double().expand(4, -1, -1, -1), values.double().expand(4, -1, -1, -1),
        attn_mask=seen[:, None, None], enable_gqa=True,
    ).squeeze(2)  # fmt: skip
    with torch.inference_mode():
        found = attend_tokens(q, keys, values, starts, lengths)
    torch.testing.assert_close(found.double(), expected, atol=3e-6, rtol=1e-5)


def test_a_cpu_attends_on_device() -> None:
    assert attends_on_device(CPU)
