"""A checkpoint's layers one at a time: run over texts, with what their products take in, and judged at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from profiler.comm.links.group import RankGroup
from profiler.kernels.elementwise import rms_norm
from profiler.kernels.entry import Operand, Product
from profiler.kernels.linear import Linear
from profiler.layers.decoder_layer import DecoderLayer, Norms, projections
from profiler.model import LayerSpec, ModelShape
from profiler.model.shape import layer_prefix
from profiler.model.tensors import LinearSpec, NormSpec
from runtime.quantize.texts import HiddenStates
from runtime.run.prompts import TokenIds
from runtime.weights.checkpoint import Checkpoint

_LOGIT_ROWS = 256
See = Callable[[str, torch.Tensor], None]  # a linear's name and its input [T, K]


class Layer:
    """The tensors of one layer, read when they are first asked for, in float32."""

    def __init__(self, index: int, spec: LayerSpec, checkpoint: Checkpoint) -> None:
        self.index, self.spec, self.checkpoint = index, spec, checkpoint
        self._read: dict[str, torch.Tensor] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """By its name within the layer."""
        if name not in self._read:
            self._read[name] = self.checkpoint.read(layer_prefix(self.index) + name)
        return self._read[name]

    def weight(self, linear: LinearSpec) -> torch.Tensor:
        """[n, k] as it runs."""
        return torch.cat([self._rows(linear, number, "weight") for number in range(len(linear.parts))])

    def bias(self, linear: LinearSpec) -> torch.Tensor | None:
        """[n] as it runs."""
        if not linear.has_bias:
            return None
        return torch.cat([self._rows(linear, number, "bias") for number in range(len(linear.parts))])

    def norm(self, spec: NormSpec) -> torch.Tensor:
        """A norm's weight."""
        return self.tensor(spec.tensor + ".weight")

    def runner(self, shape: ModelShape, see: See | None = None) -> DecoderLayer:
        """What runs it; `see` is shown what its products take in."""
        products: dict[str, Product] = {}
        for linear in self.spec.linears:
            product = Linear(self.weight(linear), self.bias(linear))
            products[linear.name] = product if see is None else _Watched(product, linear.name, see)
        alone = RankGroup()
        return DecoderLayer(
            self.spec,
            1,
            norms=Norms.of(self.spec, self.norm, eps=shape.norm_eps),
            **projections(products),
            reduce_o=alone.reduce(None),
            reduce_down=alone.reduce(None),
            sum_ranks=alone.sum,
        )

    def _rows(self, linear: LinearSpec, number: int, kind: str) -> torch.Tensor:
        part = linear.parts[number]
        return self.tensor(f"{part.tensor}.{kind}")[part.first_row : part.first_row + part.rows.size]


class _Watched:
    """A product that shows its input."""

    def __init__(self, product: Linear, name: str, see: See) -> None:
        self.product, self.name, self.see = product, name, see
        self.entry = product.entry

    def __call__(self, x: Operand) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        self.see(self.name, x)
        return self.product(x)


def layers_of(checkpoint: Checkpoint, shape: ModelShape) -> Iterator[Layer]:
    """One after another; the files of each are given back after it."""
    for index, spec in enumerate(shape.layers):
        yield Layer(index, spec, checkpoint)
        checkpoint.close()


@torch.inference_mode()
def perplexity(folder: Path, shape: ModelShape, sequences: Sequence[TokenIds], device: torch.device) -> float:
    """exp of the mean negative log-likelihood of each token after the first of its sequence, in float32."""
    checkpoint = Checkpoint(folder, device=device, dtype=torch.float32)
    states = HiddenStates(sequences, shape, device, torch.float32)
    states.embed(checkpoint.read(next(iter(shape.embedding.tensors()))))
    for layer in layers_of(checkpoint, shape):
        states.run(layer.runner(shape), layer.spec)
    norm = checkpoint.read(next(iter(shape.final_norm.tensors())))
    head = Linear(checkpoint.read(next(iter(shape.head.tensors()))))
    total, count = 0.0, 0
    for hidden, ids in states.targets():
        for first in range(0, hidden.shape[0], _LOGIT_ROWS):
            rows = slice(first, first + _LOGIT_ROWS)
            logits = head(rms_norm(hidden[rows], norm, shape.norm_eps)).float()
            total += float(F.cross_entropy(logits, ids[rows], reduction="sum"))
        count += hidden.shape[0]
    return math.exp(total / count)
