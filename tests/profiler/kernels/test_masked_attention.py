"""Attention under windows, softcaps and sinks against plain softmax over all scores in float64."""

from __future__ import annotations

import pytest
import torch

from profiler.kernels.attention import attend, attend_tokens
from profiler.kernels.attention_kernel import AttentionKernel, Masking

HEADS, KV_HEADS, DIM = 6, 2, 16
MASKS = [
    (None, 3.0, False),
    (None, None, True),
    (16, 2.0, True),
    *((window, None, False) for window in (1, 60, 61, 500)),
]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking) -> torch.Tensor:
    q, k, v = q.double(), k.double().repeat_interleave(3, dim=0), v.double().repeat_interleave(3, dim=0)
    scores = q @ k.transpose(1, 2) * DIM**-0.5
    if masking.softcap:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
    hidden = (distance < 0) | (distance >= (masking.window or k.shape[1]))
    scores = scores.masked_fill(hidden, -torch.inf)
    if masking.sinks is not None:
        scores = torch.cat([scores, masking.sinks.double().view(-1, 1, 1).expand(-1, q.shape[1], 1)], dim=-1)
    return (scores.softmax(dim=-1)[..., : k.shape[1]] @ v).float()


@pytest.mark.parametrize(("window", "softcap", "has_sinks"), MASKS)
@pytest.mark.parametrize(("chunk", "context"), [(61, 0), (150, 83), (1, 200)])
def test_as_softmax_over_all_scores(
    window: int | None, softcap: float | None, has_sinks: bool, chunk: int, context: int
) -> None:
    torch.manual_seed(3)
    q = torch.randn(chunk, HEADS, DIM).transpose(0, 1)
    slabs = torch.randn(2, KV_HEADS, 10 + context + chunk, DIM)
    k, v = slabs[:, :, 10:]
    masking = Masking(window=window, softcap=softcap, sinks=torch.randn(HEADS) if has_sinks else None)
    expected = plain(q, k, v, masking)
    torch.testing.assert_close(attend(AttentionKernel.CPU_FOLDED, q, k, v, masking), expected, rtol=1e-4, atol=1e-5)
    first = masking.first_seen(context + chunk, chunk)
    seen = attend(AttentionKernel.CPU_MASKED, q, k[:, first:], v[:, first:], masking)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    if chunk == 1:
        starts, lengths = torch.tensor([10]), torch.tensor([context + 1])
        step = attend_tokens(q.transpose(0, 1), slabs[0], slabs[1], starts, lengths, masking)
        torch.testing.assert_close(step.transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
