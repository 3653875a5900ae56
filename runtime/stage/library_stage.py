"""A stage whose layers run through Transformers: one request's chunk at a time, with the KV slab as its cache."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from profiler.comm.links.group import Groups
from profiler.library.found import find
from profiler.library_layers.cache import RequestCache
from profiler.library_layers.part import StagePart
from profiler.model import PRECISIONS
from runtime.job.job import RunJob
from runtime.job.place import Place
from runtime.stage.sequence import Scheme
from runtime.stage.share import RoundShare
from runtime.stage.stage import ALL_LAYERS, Stage
from tuner.plan.plan import Request


class LibraryStage(Stage):
    """Its layers are the library's own, unmodified; each request has a cache of its own."""

    def __init__(self, job: RunJob, place: Place, groups: Groups, device: torch.device) -> None:
        super().__init__(job, device)
        self.dtype = PRECISIONS[job.dtype].activations.torch_dtype
        self.scheme = Scheme(job, groups, device, job.kernels)
        layers = range(place.layers[0], place.layers[-1] + 1)
        self.part = StagePart(find(job.shape.config), layers, device=device, dtype=self.dtype, weights=job.weights)
        self.caches = [self._cache(request, job.max_new_tokens) for request in job.requests]

    @property
    def is_recordable(self) -> bool:
        """See `Stage`: the caches' sizes are kept in Python, and `replayed` tells of them."""
        return all(cache.is_static for cache in self.caches) and self.part.is_recordable

    @property
    def is_step_recordable(self) -> bool:
        """See `Stage`: each step finds longer caches."""
        return False

    def replayed(self, share: RoundShare) -> None:
        """See `Stage`."""
        for chunk in share.chunks:
            self.caches[chunk.request].stand_behind(chunk.end)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See `Stage`."""
        return self.part.embed(token_ids)

    def forward(self, share: RoundShare, hidden: torch.Tensor, layers: slice = ALL_LAYERS) -> torch.Tensor:
        """See `Stage`."""
        outputs, first = [], 0
        for chunk in share.chunks:
            rows = hidden[first : first + chunk.tokens]
            outputs.append(self.part.run(rows, self.caches[chunk.request], chunk.start))
            first += chunk.tokens
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def forward_step(self, hidden: torch.Tensor, layers: slice = ALL_LAYERS) -> torch.Tensor:
        """See `Stage`; a request is where its cache is."""
        rows = hidden.split(1)
        return torch.cat(
            [self.part.run(row, cache, cache.length) for row, cache in zip(rows, self.caches, strict=True)]
        )

    def next_ids(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Stage`."""
        return self.part.next_ids(hidden)

    def warm_up(self, rounds: Iterable[RoundShare]) -> None:
        """Run one token of each request, which allocates its slabs, and one round of each shape for the first one; and
        the ends of the model."""
        for cache in self.caches:
            self._run_zeros(cache, 1)
        for tokens in sorted({chunk.tokens for share in rounds for chunk in share.chunks}):
            first = max(self.caches, key=lambda cache: cache.rows)
            self._run_zeros(first, tokens)

    def _run_zeros(self, cache: RequestCache, tokens: int) -> None:
        hidden = torch.zeros(tokens, self.shape.hidden_size, device=self.device, dtype=self.dtype)
        if self.part.is_first:
            hidden = self.embed(torch.zeros(tokens, device=self.device, dtype=torch.int64))
        hidden = self.part.run(hidden, cache, 0)
        if self.part.is_last:
            self.next_ids(hidden[-1:])
        cache.begin(0)

    def _cache(self, request: Request, max_new_tokens: int) -> RequestCache:
        rows = request.prompt_tokens + max_new_tokens
        return self.part.cache(rows, cached_tokens=request.cached_tokens)
