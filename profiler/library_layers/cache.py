"""What one request keeps in the layers of a stage: a slab of keys and values, windows, and states that do not grow."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)


def _allocate(layer: Any, key_states: torch.Tensor, value_states: torch.Tensor, rows: int) -> None:
    """Give a layer of a cache so many rows. Zeros: on a CPU this touches the pages before the clock starts."""
    layer.dtype, layer.device = key_states.dtype, key_states.device
    layer.keys, layer.values = (
        states.new_zeros(*states.shape[:-2], rows, states.shape[-1]) for states in (key_states, value_states)
    )
    layer.is_initialized = True


class SlabLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values [1, KV heads, rows, D], allocated once; the library's own layer copies all of them each chunk."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.length = rows, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate by the first keys and values."""
        _allocate(self, key_states, value_states, self.rows)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new rows -> all rows so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = slice(self.length, self.length + key_states.shape[-2])
        self.keys[..., places, :] = key_states
        self.values[..., places, :] = value_states
        self.length = places.stop
        return self.keys[..., : places.stop, :], self.values[..., : places.stop, :]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def reset(self) -> None:
        """Forget the tokens, keep the memory."""
        self.length = 0


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The keys and values of the last `sliding_window - 1` tokens, in memory that stays where it is.

    What it holds follows from how many tokens there were, so that recorded chunks can be replayed in order.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate by the first keys and values."""
        _allocate(self, key_states, value_states, self.sliding_window - 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the newest rows -> those that were kept, and the new ones behind them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = min(self.cumulative_length, self.sliding_window - 1)
        self.cumulative_length += key_states.shape[-2]
        left = min(self.cumulative_length, self.sliding_window - 1)
        seen = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            rows = torch.cat([kept[..., :before, :], new], dim=-2) if before else new
            kept[..., :left, :] = rows[..., rows.shape[-2] - left :, :]
            seen.append(rows)
        return seen[0], seen[1]

    def reset(self) -> None:
        """Forget the tokens, keep the memory."""
        self.cumulative_length = 0


class RequestCache:
    """One request's cache over a stage's layers.

    rows: tokens that it may hold. `cached_tokens` of the prompt are there before the plan's rounds: what windows and
    states were then is kept, for passes that begin again.
    """

    def __init__(self, text_config: Any, layers: Collection[int], *, rows: int, cached_tokens: int = 0) -> None:
        self.layers, self.rows, self.cached_tokens, self.length = frozenset(layers), rows, cached_tokens, 0
        made = []
        for index, (kind, kwargs) in enumerate(zip(*get_layer_types_and_kwargs(text_config), strict=True)):
            layer = DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)
            if index not in self.layers:
                self._stand_in(layer)
            elif type(layer) is DynamicLayer:
                layer = SlabLayer(rows)
            elif type(layer) is DynamicSlidingWindowLayer:
                layer = WindowLayer(**kwargs)
            made.append(layer)
        self.cache = Cache(layers=made)
        self._kept: dict[int, Any] = {}
        self._pretended: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    @property
    def is_static(self) -> bool:
        """Whether its memory stays where it is, and all else about it is how many tokens there were.

        Windows of cached tokens are restored before each pass, which a recording would not do.
        """
        own = [self.cache.layers[index] for index in self.layers]
        has_windows = any(isinstance(layer, WindowLayer) for layer in own)
        return all(isinstance(layer, (SlabLayer, WindowLayer)) for layer in own) and not (
            has_windows and self.cached_tokens
        )

    def stand_behind(self, tokens: int) -> None:
        """So many tokens are there, by a recording that was replayed."""
        for index in self.layers:
            layer = self.cache.layers[index]
            if isinstance(layer, SlabLayer):
                layer.length = tokens
            elif isinstance(layer, WindowLayer):
                layer.cumulative_length = tokens
        self._set_length(tokens)

    def begin(self, context: int) -> None:
        """Make ready for tokens after `context` ones: a pass over a prompt may begin again."""
        if context == self.length:
            return
        if context and context != self.cached_tokens:
            raise RuntimeError(f"a chunk begins at {context} after {self.length} tokens")
        if context:
            for index, layer in self._kept.items():
                self.cache.layers[index] = copy.deepcopy(layer)
            for layer in self.cache.layers:
                if isinstance(layer, SlabLayer):
                    layer.length = context
        else:
            for index in self.layers:
                self.cache.layers[index].reset()
        self._set_length(context)

    def pretend(self, context: int) -> None:
        """Stand behind `context` tokens that never ran, to time what comes after them: zeros in their place.

        A token must have run before, so that sizes are known.
        """
        for index in self.layers:
            layer = self.cache.layers[index]
            if isinstance(layer, DynamicIndexedLayer):
                layer.keys, layer.values = self._zeros(index, context)
                (layer.indexer_keys,) = self._zeros(-1 - index, context)
        self.stand_behind(context)

    def _zeros(self, index: int, tokens: int) -> tuple[torch.Tensor, ...]:
        """Of the sizes of a layer's keys and values (below zero: of its selector's keys), made once."""
        if (index, tokens) not in self._pretended:
            layer = self.cache.layers[index if index >= 0 else -1 - index]
            alike = (layer.keys, layer.values) if index >= 0 else (layer.indexer_keys,)
            self._pretended[index, tokens] = tuple(
                one.new_zeros(*one.shape[:-2], tokens, one.shape[-1]) for one in alike
            )
        return self._pretended[index, tokens]

    def advance(self, tokens: int) -> None:
        """So many tokens ran through the stage's layers."""
        self._set_length(self.length + tokens)
        if self.length == self.cached_tokens:
            self._kept = {
                index: copy.deepcopy(layer)
                for index, layer in enumerate(self.cache.layers)
                if index in self.layers and not isinstance(layer, SlabLayer)
            }

    def _stand_in(self, layer: Any) -> None:
        """Let a layer of another stage say how many tokens there were, which masks ask of it; it keeps none."""
        if isinstance(layer, DynamicLayer):
            layer.get_seq_length = lambda: self.length

    def _set_length(self, length: int) -> None:
        self.length = length
        for index, layer in enumerate(self.cache.layers):
            if index in self.layers:
                continue
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, length > 0)
