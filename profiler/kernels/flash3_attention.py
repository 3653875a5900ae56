"""Attention by FlashAttention-3's forward kernels for Hopper, through the optional package fa3-fwd."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

HOPPER = (9, 0)
LARGEST_HEAD = 256  # features of a head
_NAME = "fa3_fwd"


@cache
def is_available(device: torch.device) -> bool:
    """Whether the package is there and the card is one that its kernels are built for."""
    return find_spec(_NAME) is not None and torch.cuda.get_device_capability(device) == HOPPER


def takes(head_dim: int, value_dim: int) -> bool:
    """Whether there is a kernel for keys and values of so many features: alike, or those of DeepSeek's latents."""
    return head_dim % 8 == 0 and (value_dim == head_dim <= LARGEST_HEAD or (head_dim, value_dim) == (192, 128))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """Causal attention of the last c of p + c positions in bfloat16; no work is prepared for new sizes.

    q: [H, c, D], k: [KV, p + c, D], v: [KV, p + c, V], any strides of contiguous rows -> [H, c, V], laid out [c, H, V].
    scale: of scores, D**-0.5 where it is None.
    """
    return attend_with_lse(q, k, v, causal=True, scale=scale)[0]


def attend_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, or over all keys; and the log-sum-exp of each row's scores, [H, c, 1] in float32."""
    load()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse, *_ = torch.ops.fa3_fwd.fwd(q, k, v, softmax_scale=scale, is_causal=causal, num_splits=1)
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0).unsqueeze(-1)


@cache
def load() -> None:
    """Register the package's operators with torch."""
    import fa3_fwd._C  # noqa: F401 - its import registers them
