"""Attention of the library's layers by kernels here: under the plain causal mask no mask is made, and none is read.

The library's own way builds a mask of chunk x (context + chunk) for every chunk behind a context, and the kernels that
read a mask are the slower ones. It stays for windows and for whatever else is more than causal.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from profiler.kernels.attention import attend, available_kernels
from profiler.kernels.attention_kernel import AttentionKernel

_NAME = "isochunk"
_LARGEST_HEAD = 256  # features of a head that the kernels take


def use_kernels(model: Any) -> None:
    """Let a model attend by the kernels here, if it takes any attention that asks for no mask."""
    if model.config._attn_implementation == "sdpa" and model._supports_flash_attn:
        _register()
        model.set_attn_implementation(_NAME)


@cache
def _register() -> None:
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """None for the causal mask of the last `q_length` of `kv_length` tokens; the library's for others."""
    ends_together = q_offset + q_length == kv_offset + kv_length and kv_offset == 0
    if allow_is_causal_skip and mask_function is causal_mask_function and attention_mask is None and ends_together:
        return None
    mask: torch.Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip=allow_is_causal_skip, **options,
    )  # fmt: skip
    return mask


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, c, D], key and value [1, KV, p + c, D] -> [1, c, H, D]."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    more = any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    if attention_mask is not None or not causal or dropout or more or query.shape[0] != 1:
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return out
    kernel = _kernel_for(query, value, scaling)
    if kernel is not AttentionKernel.SDPA:
        return attend(kernel, query[0], key[0], value[0]).transpose(0, 1)[None], None
    return _lower_right(query, key, value, scaling).transpose(1, 2), None


def _kernel_for(query: torch.Tensor, value: torch.Tensor, scaling: float | None) -> AttentionKernel:
    """The best that takes these sizes and this scale of scores; torch's own takes all."""
    head_dim = query.shape[3]
    alike = value.shape[3] == head_dim <= _LARGEST_HEAD and head_dim % 8 == 0
    kernels = available_kernels(query.device, query.dtype)
    usual_scale = scaling is None or abs(scaling * head_dim**0.5 - 1.0) < 1e-6
    if not alike or not usual_scale or (query.is_cuda and kernels[0] is not AttentionKernel.FLASH3):
        return AttentionKernel.SDPA
    return kernels[0]


def _lower_right(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    chunk, tokens, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    if key.shape[3] != value.shape[3] and group > 1:  # the kernels that take it know no groups
        key, value, group = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1), 1
    if chunk == tokens or chunk == 1:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=chunk > 1, scale=scaling, enable_gqa=group > 1
        )
    from torch.nn.attention.bias import causal_lower_right  # brings torch.compile along: a second of every start

    mask: Any = causal_lower_right(chunk, tokens)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=group > 1)
