"""The work of a layer between its matmuls and its attention: fused kernels on CUDA, torch's own operators elsewhere."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from profiler.layer import LayerInputs, Norms


@cache
def has_triton() -> bool:
    """Whether kernels can be fused: torch brings Triton along where there may be a card."""
    return find_spec("triton") is not None


def _fuses(x: torch.Tensor) -> bool:
    return x.is_cuda and has_triton()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019), accumulated in float32."""
    if _fuses(x) and x.dim() == 2:
        from profiler import fused

        return fused.rms_norm(x, weight, eps)
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
        from profiler import fused

        return fused.add_rms_norm(stream, update, weight, eps)
    stream = stream + update
    return stream, rms_norm(stream, weight, eps)


def silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's element-wise half (Shazeer, 2020): [T, 2F] -> silu of the first half times the second [T, F]."""
    if _fuses(gate_up):
        from profiler import fused

        return fused.silu_product(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rotate_into_slab(
    qkv: torch.Tensor, inputs: LayerInputs, norms: Norms, keys: torch.Tensor, values: torch.Tensor, *, num_heads: int
) -> torch.Tensor:
    """Norm (Qwen3) and rotate q and k, write k and v to the slab, return q [T, H, D].

    qkv: [T, (H + 2 KV) D]; keys, values: this layer's slab [KV, rows, D].
    """
    cos, sin = inputs.rotary
    if _fuses(qkv):
        from profiler import fused

        return fused.rotate_into_slab(
            qkv, cos, sin, inputs.slab_rows, keys, values,
            num_heads=num_heads, query_norm=norms.query, key_norm=norms.key, eps=norms.eps,
        )  # fmt: skip
    num_kv_heads, _, head_dim = keys.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms.query is not None and norms.key is not None:
        q, k = rms_norm(q, norms.query, norms.eps), rms_norm(k, norms.key, norms.eps)
    inputs.write(rotate(k, cos, sin), keys)
    inputs.write(v, values)
    return rotate(q, cos, sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., 2021) in the half-split layout; x: [T, heads, D], cos and sin: [T, D / 2]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out
