"""One stage of the pipeline on one rank: runs a round through its layers, and chooses tokens if it is the last."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

from profiler.comm.links.group import RankGroup
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.kernels.rotary import Rotary
from profiler.layers.decode_inputs import Step
from profiler.layers.decoder_layer import LayerInputs, Stream
from profiler.layers.head import embed
from profiler.layers.prefill_inputs import prepare_round
from profiler.model import PRECISIONS
from runtime.job.job import Job
from runtime.job.place import Place
from runtime.stage.slab import KVSlab
from runtime.weights.checkpoint import Checkpoint, RandomWeights
from runtime.weights.shard import load_shard
from tuner.plan.kv_rows import assign_rows
from tuner.plan.plan import Round


class Stage:
    """Weights, KV slab and rotary table of one rank. It knows its rounds, not its neighbours."""

    def __init__(self, job: Job, place: Place, group: RankGroup, device: torch.device) -> None:
        self.shape, self.requests, self.device = job.shape, job.requests, device
        precision = PRECISIONS[job.dtype]
        self.dtype, weights_dtype = precision.activations.torch_dtype, precision.weights.torch_dtype
        weights = (
            RandomWeights(job.shape, device=device, dtype=weights_dtype)
            if job.weights is None
            else Checkpoint(job.weights, device=device, dtype=weights_dtype)
        )
        self.shard = load_shard(job.shape, place, weights, group)
        self.slab = KVSlab(
            [job.shape.layers[index] for index in place.layers],
            assign_rows(job.requests, job.rounds, max_new_tokens=job.max_new_tokens),
            tp_size=place.parallel.tp_size,
            device=device,
            dtype=precision.kv.torch_dtype,
        )
        prompt_tokens = [request.prompt_tokens for request in job.requests]
        self.step = Step(starts=self.slab.start, prompt_tokens=prompt_tokens, device=device)
        self.rotary = Rotary(job.shape, device)
        self.kernels = cache(job.kernels)  # a search among the measured points, for each chunk of each round

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """On the first stage: token_ids [T] -> [T, hidden]."""
        assert self.shard.embedding is not None
        return embed(self.shard.embedding, token_ids)

    def forward(self, chunks: Round, hidden: torch.Tensor, *, num_layers: int | None = None) -> torch.Tensor:
        """Run a round: hidden [T, hidden], the chunks' tokens packed in order -> [T, hidden]; KV goes to the slab."""
        inputs = prepare_round(
            [(self.slab.start[chunk.request], chunk.start, chunk.tokens) for chunk in chunks],
            rotary=self.rotary,
            choose_kernel=self._choose_kernel,
            device=self.device,
            dtype=self.dtype,
        )
        return self._run_layers(hidden, inputs, num_layers)

    def forward_step(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run one token of every request, in order, at the positions that `step` holds, and move those on.

        hidden: [R, hidden] -> [R, hidden]; KV goes to the slab.
        """
        hidden = self._run_layers(hidden, self.step.inputs(self.rotary, self.dtype))
        self.step.advance()
        return hidden

    def final_rows(self, chunks: Round) -> dict[int, int]:
        """Row of the packed round that gives each request's next token, for the requests whose prompt is complete."""
        rows, row = {}, 0
        for chunk in chunks:
            row += chunk.tokens
            if chunk.end >= self.requests[chunk.request].prompt_tokens:
                rows[chunk.request] = row - 1
        return rows

    def next_ids(self, hidden: torch.Tensor, rows: Iterable[int] | None = None) -> torch.Tensor:
        """On the last stage: hidden [T, hidden] and the rows wanted [R], all if None -> token ids [R] int64."""
        assert self.shard.head is not None
        return self.shard.head(hidden if rows is None else torch.cat([hidden[row : row + 1] for row in rows]))

    def warm_up(self, rounds: Iterable[Round]) -> None:
        """Run each distinct shape of round once through one layer and the head.

        Libraries build kernels the first time they see a shape (cuDNN 45 to 110 ms): not on the run's clock. Call it
        before anything is in the slab, which it writes.
        """
        for chunks in self._distinct(rounds):
            num_tokens = sum(chunk.tokens for chunk in chunks)
            hidden = torch.zeros(num_tokens, self.shape.hidden_size, device=self.device, dtype=self.dtype)
            if self.shard.embedding is not None:
                hidden = self.embed(torch.zeros(num_tokens, device=self.device, dtype=torch.int64))
            hidden = self.forward(chunks, hidden, num_layers=1)
            rows = self.final_rows(chunks)
            if self.shard.head is not None and rows:
                self.next_ids(hidden, rows.values())

    def _run_layers(self, hidden: torch.Tensor, inputs: LayerInputs, num_layers: int | None = None) -> torch.Tensor:
        stream = Stream(hidden)
        for index, layer in enumerate(self.shard.layers[:num_layers]):
            stream = layer(stream, inputs, *self.slab[index])
        return stream.added()

    def _choose_kernel(self, chunk: int, context: int) -> AttentionKernel:
        if chunk == 1 and self.device.type == "cuda":
            return AttentionKernel.SDPA  # a prompt's single last token is not worth a cuDNN plan for its context
        return self.kernels(chunk, context)

    def _distinct(self, rounds: Iterable[Round]) -> Iterable[Round]:
        """The first round of each shape."""
        by_shape: dict[object, Round] = {}
        for chunks in rounds:
            shape = tuple((chunk.tokens, chunk.start) for chunk in chunks), len(self.final_rows(chunks))
            by_shape.setdefault(shape, chunks)
        return by_shape.values()
