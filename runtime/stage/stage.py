"""One stage of the pipeline on one rank: runs a round through its layers, and chooses tokens if it is the last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch

from profiler.comm.links.group import Groups
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.layers.decoder_layer import ResidualStream
from profiler.layers.head import embed
from profiler.layers.layer_inputs import LayerInputs
from profiler.model import PRECISIONS
from runtime.job.job import RunJob
from runtime.job.place import Place
from runtime.stage.sequence import SCHEMES, Scheme
from runtime.stage.share import RoundShare
from runtime.stage.slab import KVSlab
from runtime.weights.checkpoint import RandomWeights
from runtime.weights.quantized import open_checkpoint
from runtime.weights.shard import load_shard

ALL_LAYERS = slice(None)


class Stage(ABC):
    """Weights and KV of one rank. It runs rounds, and does not depend on other stages."""

    scheme: Scheme
    dtype: torch.dtype  # of hidden states

    @property
    @abstractmethod
    def is_recordable(self) -> bool:
        """Whether its rounds do the same work on the same memory each time."""

    @property
    def is_step_recordable(self) -> bool:
        """Whether decode steps do, as requests grow."""
        return self.is_recordable

    def replayed(self, share: RoundShare) -> None:  # noqa: B027 - most keep nothing on the host
        """A recorded round was replayed: what the host keeps of it follows."""

    def __init__(self, job: RunJob, device: torch.device) -> None:
        self.shape, self.requests, self.device = job.shape, job.requests, device

    @abstractmethod
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """On the first stage: token_ids [T] -> [T, hidden]."""

    @abstractmethod
    def forward(self, share: RoundShare, hidden: torch.Tensor, layers: slice = ALL_LAYERS) -> torch.Tensor:
        """Run this rank's rows of a round: hidden [P, hidden], packed in order -> [P, hidden]; KV goes to the slab.

        layers: those of one group, where the stage holds several.
        """

    @abstractmethod
    def forward_step(self, hidden: torch.Tensor, layers: slice = ALL_LAYERS) -> torch.Tensor:
        """Run one token of every request, in order, at the positions that the step holds; the stage's last layer moves
        those on.

        hidden: [R, hidden] -> [R, hidden]; KV goes to the slab.
        """

    @abstractmethod
    def next_ids(self, hidden: torch.Tensor) -> torch.Tensor:
        """On the last stage: hidden [R, hidden] -> token ids [R] int64."""

    @abstractmethod
    def warm_up(self, rounds: Iterable[RoundShare]) -> None:
        """Trigger one-time work for rounds of these shapes (kernel builds), before the clock starts.

        Call it before anything is in the slab, which it writes.
        """

    def final_requests(self, share: RoundShare) -> list[int]:
        """The requests whose prompt is complete with the round."""
        return [chunk.request for chunk in share.chunks if chunk.end >= self.requests[chunk.request].prompt_tokens]

    def final_hidden(self, share: RoundShare, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that give those requests' next tokens: of hidden [P, hidden] and what other ranks ran."""
        rows = share.last_rows()
        found = [rows[request] for request in self.final_requests(share)]
        if len(share.shares) == 1:
            return torch.cat([hidden[row : row + 1] for row in found if row is not None])
        final = hidden.new_zeros(len(found), hidden.shape[1])
        for index, row in enumerate(found):
            if row is not None:
                final[index] = hidden[row]
        return self.scheme.group.sum(final)  # of one rank's rows and zeros


class KernelStage(Stage):
    """A stage whose layers run through this project's kernels, over a KV slab."""

    def __init__(self, job: RunJob, place: Place, groups: Groups, device: torch.device) -> None:
        super().__init__(job, device)
        self.kernels = job.kernels
        self.shape = job.shape.spread(**job.parallel.spread)
        precision = PRECISIONS[job.dtype]
        self.dtype, weights_dtype = precision.activations.torch_dtype, precision.weights.torch_dtype
        weights = (
            RandomWeights(job.shape, device=device, dtype=weights_dtype)
            if job.weights is None
            else open_checkpoint(job.weights, job.shape, device=device, dtype=weights_dtype)
        )
        self.shard = load_shard(self.shape, place, weights, groups, precision)
        self.scheme = SCHEMES[job.parallel.sp_kind](job, groups, device, self._choose_kernel)
        layers = [job.shape.layers[index] for index in place.layers]
        self.slab = KVSlab(
            [(self.scheme.kv_heads(layer), layer.attention.kept_widths) for layer in layers],
            self.scheme.kv_rows,
            device=device,
            dtype=self.dtype,
            kept=precision.kv.torch_dtype if precision.has_kv_scales else None,
            static=weights.kv_scales(place.layers) if precision.has_kv_scales else None,
        )

    @property
    def is_recordable(self) -> bool:
        """See `Stage`."""
        return True

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See `Stage`."""
        assert self.shard.embedding is not None
        return embed(self.shard.embedding, token_ids)

    def forward(self, share: RoundShare, hidden: torch.Tensor, layers: slice = ALL_LAYERS) -> torch.Tensor:
        """See `Stage`."""
        return self._run_layers(hidden, self.scheme.round_inputs(share), layers)

    def forward_step(self, hidden: torch.Tensor, layers: slice = ALL_LAYERS) -> torch.Tensor:
        """See `Stage`."""
        hidden = self._run_layers(hidden, self.scheme.step_inputs(), layers)
        if layers.stop in (None, len(self.shard.layers)):
            self.scheme.step.advance()
        return hidden

    def next_ids(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Stage`."""
        assert self.shard.head is not None
        return self.shard.head(hidden)

    def warm_up(self, rounds: Iterable[RoundShare]) -> None:
        """Run each distinct shape of round once through one layer and the head.

        Libraries build kernels the first time they see a shape (cuDNN 45 to 110 ms).
        """
        for share in self._distinct(rounds):
            hidden = torch.zeros(share.num_rows, self.shape.hidden_size, device=self.device, dtype=self.dtype)
            if self.shard.embedding is not None:
                hidden = self.embed(torch.zeros(share.num_rows, device=self.device, dtype=torch.int64))
            hidden = self.forward(share, hidden, slice(1))
            if self.shard.head is not None and self.final_requests(share):
                self.next_ids(self.final_hidden(share, hidden))

    def _run_layers(self, hidden: torch.Tensor, inputs: LayerInputs, layers: slice) -> torch.Tensor:
        stream = ResidualStream(hidden)
        gathered, indices = self.shard.gathered, range(*layers.indices(len(self.shard.layers)))
        if gathered is not None:
            gathered.begin(indices.start)
        for index in indices:
            if gathered is not None:
                gathered.wait(index)
                if index + 1 in indices:
                    gathered.begin(index + 1)
            stream = self.shard.layers[index](stream, inputs, *self.slab[index])
        return stream.added()

    def _choose_kernel(self, chunk: int, context: int) -> AttentionKernel:
        if chunk == 1 and self.device.type == "cuda":
            return AttentionKernel.SDPA  # a prompt's single last token is not worth a cuDNN plan for its context
        return self.kernels(chunk, context)

    def _distinct(self, rounds: Iterable[RoundShare]) -> Iterable[RoundShare]:
        """The first round of each shape."""
        by_shape: dict[object, RoundShare] = {}
        for share in rounds:
            chunks = tuple((chunk.tokens, chunk.start) for chunk in share.chunks)
            by_shape.setdefault((chunks, share.cut, len(self.final_requests(share))), share)
        return by_shape.values()
