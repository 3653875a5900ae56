"""One layer of a model of Transformers, timed behind any context, and what a forward does before layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from profiler.library.found import Found
from profiler.library_layers.part import StagePart

Run = Callable[[int], torch.Tensor]


class _EnteredError(Exception):
    """Ends a forward before its first layer."""


class TimedLayer:
    """The layer at one index, with random weights and one request's cache of `rows` tokens."""

    def __init__(self, found: Found, index: int, *, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.part = StagePart(found, range(index, index + 1), device=device, dtype=dtype)
        self.cache = self.part.cache(rows + 1)
        self.layer = self.part.skeleton.layers[index]
        self.hidden_size = int(found.text.hidden_size)
        self.part.run(self._random(1), self.cache, 0)  # sizes of keys, values and states

    @property
    def is_recordable(self) -> bool:
        """Whether its rounds are recorded in a run."""
        return self.part.is_recordable

    def run(self, chunk: int, context: int) -> Run:
        """The layer alone over a chunk: what the forward gives it is made once."""
        called: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hidden = self._random(chunk)
        self.cache.pretend(context)
        self.part.entered = lambda args, kwargs: called.append((args, kwargs))
        self.part.run(hidden, self.cache, context)
        self.part.entered = None
        (args, kwargs) = called[0]

        def run(_call: int) -> torch.Tensor:
            self.cache.pretend(context)
            output = self.layer.forward(*args, **kwargs)
            made: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return made

        return run

    def before(self, chunk: int, context: int) -> Run:
        """Masks, rotations and whatever else the forward makes once for all layers."""
        hidden = self._random(chunk)

        def stop(_args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            raise _EnteredError

        def run(_call: int) -> torch.Tensor:
            self.cache.pretend(context)
            self.part.entered = stop
            try:
                self.part.run(hidden, self.cache, context)
            except _EnteredError:
                pass
            finally:
                self.part.entered = None
            return hidden

        return run

    def _random(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, self.hidden_size, device=self.part.device, dtype=self.part.dtype)
