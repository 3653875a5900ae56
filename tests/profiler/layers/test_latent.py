"""Latent attention, over latents and expanded, against softmax over expanded keys and values in float64."""

from __future__ import annotations

import pytest
import torch

from profiler.kernels.attention import attend, attend_tokens
from profiler.kernels.attention_kernel import AttentionKernel, Masking
from profiler.layers import latent as latent_module
from profiler.layers.latent import Latent
from profiler.model.spec import LatentSpec
from profiler.model.tensors import Cut, Dim, LinearSpec

HEADS = 3
_NOTHING = LinearSpec(name="", cut=Cut.COLUMN, parts=(), inputs=Dim(1))
SPEC = LatentSpec(rank=10, plain=6, turned=4, value=5, q=_NOTHING, expand=_NOTHING)


def plain(q: torch.Tensor, rows: torch.Tensor, expand: torch.Tensor) -> torch.Tensor:
    q, rows = q.double(), rows.double()
    made = (rows[:, : SPEC.rank] @ expand.double().T).view(-1, HEADS, SPEC.plain + SPEC.value).transpose(0, 1)
    keys = torch.cat([made[..., : SPEC.plain], rows[None, :, SPEC.rank :].expand(HEADS, -1, -1)], dim=2)
    scores = q @ keys.transpose(1, 2) * (SPEC.plain + SPEC.turned) ** -0.5
    hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + rows.shape[0] - q.shape[1])
    return (scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ made[..., SPEC.plain :]).float()


@pytest.mark.parametrize(("chunk", "context", "absorbs"), [(61, 0, False), (150, 83, False), (5, 200, True)])
def test_as_softmax_over_expanded_keys(
    chunk: int, context: int, absorbs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_module, "EXPANDED_NUMBERS", 2 * 15 * (chunk + context))  # two heads, then the third
    torch.manual_seed(3)
    expand = torch.randn(HEADS * (SPEC.plain + SPEC.value), SPEC.rank)
    latents = Latent(SPEC, lambda _x: torch.empty(0), expand)
    slab = torch.randn(1, 10 + context + chunk, SPEC.kept)
    q = torch.randn(chunk, HEADS, SPEC.plain + SPEC.turned).transpose(0, 1)
    assert SPEC.absorbs(chunk, context) is absorbs
    masking, values = Masking(latents=latents), slab[..., :0]
    expected = plain(q, slab[0, 10:], expand)
    found = attend(AttentionKernel.CPU_FOLDED, q, slab[:, 10:], values[:, 10:], masking)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    both = latents.restore(latents.attend_absorbed(latents.absorb(q), slab[0, 10:]))
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-5)
    # Two requests in a step: the last token, and the same over the first rows alone.
    starts, lengths = torch.tensor([10, 10]), torch.tensor([context + chunk, 40])
    step = attend_tokens(q[:, -1:].transpose(0, 1).repeat(2, 1, 1), slab, values, starts, lengths, masking)
    torch.testing.assert_close(step[0], expected[:, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step[1], plain(q[:, -1:], slab[0, 10:50], expand)[:, 0], rtol=1e-4, atol=1e-5)
