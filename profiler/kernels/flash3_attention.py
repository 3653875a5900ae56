"""Attention by FlashAttention-3's forward kernels for Hopper, through the optional package fa3-fwd."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

HOPPER = (9, 0)
_NAME = "fa3_fwd"


@cache
def is_available(device: torch.device) -> bool:
    """Whether the package is there and the card is one that its kernels are built for."""
    return find_spec(_NAME) is not None and torch.cuda.get_device_capability(device) == HOPPER


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last c of p + c positions in bfloat16; no work is prepared for new sizes.

    q: [H, c, D], k and v: [KV, p + c, D], any strides of contiguous rows -> [H, c, D], laid out [c, H, D].
    """
    return attend_with_lse(q, k, v, causal=True)[0]


def attend_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, or over all keys; and the log-sum-exp of each row's scores, [H, c, 1] in float32."""
    load()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse, *_ = torch.ops.fa3_fwd.fwd(q, k, v, is_causal=causal, num_splits=1)
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0).unsqueeze(-1)


@cache
def load() -> None:
    """Register the package's operators with torch."""
    import fa3_fwd._C  # noqa: F401 - its import registers them
