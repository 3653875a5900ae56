"""A checkpoint's layers one at a time: run over texts, with what their products take in, and judged at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from profiler.comm.links.group import RankGroup
from profiler.experts.experts import Experts, ExpertWeights
from profiler.experts.products import EachProduct
from profiler.kernels.elementwise import rms_norm
from profiler.kernels.entry import Operand, Product
from profiler.kernels.linear import Linear
from profiler.layers.decoder_layer import DecoderLayer, Norms, projections
from profiler.model import LayerSpec, ModelShape
from profiler.model.experts import ExpertsMLP
from profiler.model.shape import layer_prefix
from profiler.model.spec import ROUTER
from profiler.model.tensors import LinearSpec, NormSpec
from runtime.quantize.texts import HiddenStates
from runtime.run.prompts import TokenIds
from runtime.weights.checkpoint import Checkpoint

_LOGIT_ROWS = 256
See = Callable[[torch.Tensor], None]  # is shown the input [T, K] of a product


class Tensors(dict[str, torch.Tensor]):
    """Tensors of a checkpoint in float32, by their names: each read when it is first asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    def __missing__(self, name: str) -> torch.Tensor:
        self[name] = self.checkpoint.read(name)
        return self[name]


class Layer:
    """One layer of a checkpoint; what is changed in `tensors` is what runs."""

    def __init__(self, index: int, spec: LayerSpec, checkpoint: Checkpoint) -> None:
        self.index, self.spec, self.tensors = index, spec, Tensors(checkpoint)

    def name(self, tensor: str) -> str:
        """A tensor's name in the checkpoint."""
        return layer_prefix(self.index) + tensor

    def weight(self, linear: LinearSpec) -> torch.Tensor:
        """[n, k] as it runs."""
        return torch.cat(self._parts(linear, "weight"))

    def bias(self, linear: LinearSpec) -> torch.Tensor | None:
        """[n] as it runs."""
        return torch.cat(self._parts(linear, "bias")) if linear.has_bias else None

    def norm(self, spec: NormSpec) -> torch.Tensor:
        """A norm's weight."""
        return self.tensors[self.name(spec.tensor) + ".weight"]

    def _parts(self, linear: LinearSpec, kind: str) -> list[torch.Tensor]:
        return [
            self.tensors[f"{self.name(part.tensor)}.{kind}"][part.first_row : part.first_row + part.rows.size]
            for part in linear.parts
        ]

    def products(self) -> dict[str, Product]:
        """Its linears as they are, by their names."""
        return {linear.name: Linear(self.weight(linear), self.bias(linear)) for linear in self.spec.every_linear}

    def runner(self, shape: ModelShape, products: Mapping[str, Product]) -> DecoderLayer:
        """What runs it with these products."""
        alone = RankGroup()
        return DecoderLayer(
            self.spec,
            1,
            norms=Norms.of(self.spec, self.norm, eps=shape.norm_eps),
            **projections(products),
            experts=None if self.spec.experts is None else self._experts(self.spec.experts, products),
            reduce_o=alone.reduce(None),
            reduce_down=alone.reduce(None),
            sum_ranks=alone.sum,
        )

    def _experts(self, mlp: ExpertsMLP, products: Mapping[str, Product]) -> Experts:
        pairs = [[products[matrix.name] for matrix in mlp.matrices(expert)] for expert in range(mlp.experts.count)]
        gate_up, down = (EachProduct(each) for each in zip(*pairs, strict=True))
        bias = mlp.router.bias
        return Experts(
            mlp,
            ExpertWeights(gate_up=gate_up, down=down),
            first=0,
            router=products[ROUTER],
            choice_bias=None if bias is None else self.tensors[self.name(bias.name)],
            shared=None if mlp.shared is None else (products["shared_gate_up"], products["shared_down"]),
            shared_gate=products.get("shared_gate"),
        )


class Watched:
    """A product that shows its input."""

    def __init__(self, product: Product, see: See) -> None:
        self.product, self.see, self.entry = product, see, product.entry

    def __call__(self, x: Operand) -> torch.Tensor:
        """x: [T, K] -> [T, N]."""
        assert isinstance(x, torch.Tensor)
        self.see(x)
        return self.product(x)


def layers_of(checkpoint: Checkpoint, shape: ModelShape) -> Iterator[Layer]:
    """One after another; the files of each are given back after it."""
    for index, spec in enumerate(shape.layers):
        yield Layer(index, spec, checkpoint)
        checkpoint.close()


@torch.inference_mode()
def perplexity(folder: Path, shape: ModelShape, sequences: Sequence[TokenIds], device: torch.device) -> float:
    """Of a plain checkpoint on texts, in float32."""
    checkpoint = Checkpoint(folder, device=device, dtype=torch.float32)
    states = HiddenStates(sequences, shape, device, torch.float32)
    states.embed(checkpoint.read(next(iter(shape.embedding.tensors()))))
    for layer in layers_of(checkpoint, shape):
        states.run(layer.runner(shape, layer.products()), layer.spec)
    return perplexity_of(states, checkpoint, shape)


def perplexity_of(states: HiddenStates, checkpoint: Checkpoint, shape: ModelShape) -> float:
    """exp of the mean negative log-likelihood of each token after the first of its sequence; states: after the last
    layer."""
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
