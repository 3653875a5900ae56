"""The work of a layer between its matmuls and its attention: fused kernels on CUDA, torch's own operators elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F

from profiler.kernels.quantized.kv import KV
from profiler.model.rope import WHOLE_HEADS, Rotation


class TokenPlaces(Protocol):
    """What is known of each of T tokens: its rotation, and its row in the KV slab."""

    @property
    def rotary(self) -> Mapping[Rotation, tuple[torch.Tensor, torch.Tensor]]:
        """Cosine and sine, [T, head_dim / 2] each, for each way of turning."""

    @property
    def slab_rows(self) -> torch.Tensor:
        """[T] int64."""

    def write(self, rows: torch.Tensor, slab: KV) -> None:
        """Copy rows [T, KV, D] to the tokens' places in the slab [KV, rows, D]."""


class HeadNorms(Protocol):
    """The norms of q and k: [head_dim] each, or over all heads; None where there are none."""

    @property
    def query(self) -> torch.Tensor | None:
        """Of q."""

    @property
    def key(self) -> torch.Tensor | None:
        """Of k."""

    @property
    def all_heads(self) -> bool:
        """Whether each spans all heads of all ranks."""

    @property
    def eps(self) -> float:
        """Added to the mean square."""


@cache
def has_triton() -> bool:
    """Whether kernels can be fused: torch brings Triton along where there may be a card."""
    return find_spec("triton") is not None


def _fuses(x: torch.Tensor) -> bool:
    return x.is_cuda and has_triton()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019), accumulated in float32."""
    if _fuses(x) and x.dim() == 2:
        from profiler.kernels import triton_elementwise

        return triton_elementwise.rms_norm(x, weight, eps)
    if x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    # Fewer passes over memory than torch's composite on a CPU, where the ranks share its bandwidth.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * torch.rsqrt(length * length / x.shape[-1] + eps)).mul_(weight)


def add_rms_norm(
    stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream with a block's output added, and its norm: [T, hidden] each."""
    if _fuses(stream):
        from profiler.kernels import triton_elementwise

        return triton_elementwise.add_rms_norm(stream, update, weight, eps)
    stream = stream + update
    return stream, rms_norm(stream, weight, eps)


def silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's element-wise half (Shazeer, 2020): [T, 2F] -> silu of the first half times the second [T, F]."""
    if _fuses(gate_up):
        from profiler.kernels import triton_elementwise

        return triton_elementwise.silu_product(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """As `silu_product` with GELU, approximated by tanh (Hendrycks and Gimpel, 2016)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def rotate_into_slab(
    qkv: torch.Tensor,
    inputs: TokenPlaces,
    norms: HeadNorms,
    keys: KV,
    values: KV,
    *,
    num_heads: int,
    rotation: Rotation = WHOLE_HEADS,
) -> torch.Tensor:
    """Norm each head of q and k where there is such a norm, rotate both, write k and v to the slab, return q [T, H, D].

    qkv: [T, (H + 2 KV) D]; keys, values: this layer's slab [KV, rows, D].
    """
    cos, sin = inputs.rotary[rotation]
    query_norm, key_norm = (None, None) if norms.all_heads else (norms.query, norms.key)
    if _fuses(qkv):
        from profiler.kernels import triton_elementwise

        return triton_elementwise.rotate_into_slab(
            qkv, cos, sin, inputs.slab_rows, keys, values,
            num_heads=num_heads, query_norm=query_norm, key_norm=key_norm, eps=norms.eps,
        )  # fmt: skip
    num_kv_heads, _, head_dim = keys.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if query_norm is not None and key_norm is not None:
        q, k = rms_norm(q, query_norm, norms.eps), rms_norm(k, key_norm, norms.eps)
    inputs.write(rotate(k, cos, sin), keys)
    inputs.write(v, values)
    return rotate(q, cos, sin)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredRun:
    """Consecutive rows that one rank of a group computed, and the rows of the slab that they belong to."""

    rank: int
    rows: slice
    places: slice


def write_gathered(
    gathered: torch.Tensor, rows: torch.Tensor, runs: Sequence[GatheredRun], keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Write gathered keys and values [ranks, 2, KV, P, D] to their places in the slab [KV, rows, D].

    rows: [ranks * P] int64, the slab's row of each, -1 for padding; runs: the same as runs of rows.
    """
    if _fuses(gathered):
        from profiler.kernels import triton_elementwise

        triton_elementwise.write_gathered(gathered, rows, keys, values)
        return
    for run in runs:
        keys[:, run.places] = gathered[run.rank, 0, :, run.rows]
        values[:, run.places] = gathered[run.rank, 1, :, run.rows]


def norm_all_heads(qkv: torch.Tensor, norms: HeadNorms, mean_of_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Norm q over all its heads on all ranks, and k, within qkv [T, (H + 2 KV) D]; accumulated in float32.

    mean_of_ranks: [T, 2] -> the mean over the ranks, which hold as many heads each. KV heads that several ranks hold
    count once a rank, each as often as any other, so that their mean is right too.
    """
    assert norms.query is not None and norms.key is not None
    ends = norms.query.shape[0], norms.query.shape[0] + norms.key.shape[0]
    q, k = qkv[:, : ends[0]], qkv[:, ends[0] : ends[1]]
    means = torch.stack([part.float().square().mean(dim=-1) for part in (q, k)], dim=-1)
    scales = torch.rsqrt(mean_of_ranks(means) + norms.eps)
    q.copy_(q.float() * scales[:, :1] * norms.query)
    k.copy_(k.float() * scales[:, 1:] * norms.key)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., 2021) in the half-split layout; x: [T, heads, D], cos and sin: [T, D / 2]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out
