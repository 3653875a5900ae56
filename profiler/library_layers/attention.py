"""Attention of the library's layers by kernels here: under a causal mask, of a window or not, no mask is made or read.

The library's own way builds a mask of chunk x (context + chunk) for every chunk behind a context, and the kernels that
read a mask are the slower ones. It stays for whatever is neither.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from profiler.kernels import flash3_attention
from profiler.kernels.attention import attend, attend_masked, available_kernels
from profiler.kernels.attention_kernel import AttentionKernel, Masking

_NAME = "isochunk"


def use_kernels(model: Any) -> None:
    """Let a model attend by the kernels here, if it takes any attention that asks for no mask.

    A model that the library runs by whole matrices of scores alone is one of these if sinks are what keeps it there.
    """
    known = model.config._attn_implementation
    if model._supports_flash_attn and (known == "sdpa" or (known == "eager" and _has_sinks(model))):
        _register()
        model.set_attn_implementation(_NAME)


def _has_sinks(model: Any) -> bool:
    return any(name.endswith(".sinks") for name, _ in model.named_parameters())


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
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor | None:
    """None for the causal mask of the last `q_length` of `kv_length` tokens, [1, 1, 0, W] for that of a window of W
    tokens, no numbers in it; the library's for others."""
    ends_together = q_offset + q_length == kv_offset + kv_length
    if allow_is_causal_skip and attention_mask is None and ends_together and batch_size == 1:
        if mask_function is causal_mask_function and kv_offset == 0:
            return None
        if window := window_of(mask_function):
            return torch.empty(1, 1, 0, window, dtype=torch.bool, device=device)
    mask: torch.Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip=allow_is_causal_skip, device=device, **options,
    )  # fmt: skip
    return mask


def window_of(mask_function: Any) -> int | None:
    """The window of a function that the library makes for causal sliding windows; None for any other."""
    if getattr(mask_function, "__code__", None) is not sliding_window_causal_mask_function(1).__code__:
        return None
    (parts,) = (cell.cell_contents for cell in mask_function.__closure__)
    overlays = [part for part in parts if part is not causal_mask_function]
    if len(parts) != 2 or len(overlays) != 1 or overlays[0].__code__ is not sliding_window_overlay(1).__code__:
        return None
    (window,) = (cell.cell_contents for cell in overlays[0].__closure__)
    return int(window)


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
    """query [1, H, c, D], key [1, KV, p + c, D] and value [1, KV, p + c, V] -> [1, c, H, V]."""
    window = None
    if attention_mask is not None and attention_mask.shape[-2] == 0:
        window, attention_mask = attention_mask.shape[-1], None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    masking = Masking(window=window, softcap=options.get("softcap"), sinks=options.get("s_aux"))
    more = any(options.get(name) is not None for name in ("position_bias", "cache"))
    if attention_mask is not None or not causal or dropout or more or query.shape[0] != 1:
        if window is not None or masking.sinks is not None:
            raise NotImplementedError(f"{type(module).__name__}: windows and sinks under a mask of its own")
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return out
    q, k, v = query[0], key[0], value[0]
    if not masking.is_plain(k.shape[1]):
        return attend_masked(_scaled(q, scaling), k, v, masking).transpose(0, 1)[None], None
    kernel = available_kernels(q.device, q.dtype)[0]
    if kernel is AttentionKernel.FLASH3 and flash3_attention.takes(q.shape[2], v.shape[2]):
        return flash3_attention.attend(q, k, v, scale=scaling).transpose(0, 1)[None], None
    if not q.is_cuda and q.shape[2] == v.shape[2] and _is_usual(scaling, q.shape[2]):
        return attend(kernel, q, k, v).transpose(0, 1)[None], None
    return _lower_right(query, key, value, scaling).transpose(1, 2), None


def _is_usual(scaling: float | None, head_dim: int) -> bool:
    return scaling is None or abs(scaling * head_dim**0.5 - 1.0) < 1e-6


def _scaled(q: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Queries whose scores have this scale in kernels that know the usual one alone."""
    return q if scaling is None or _is_usual(scaling, q.shape[2]) else q * (scaling * q.shape[2] ** 0.5)


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
