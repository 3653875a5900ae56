"""What each unit of a model adds: its share of the residual stream's energy on a text, or what baselines say.

One currency for all kinds: a unit's mean square contribution to the residual stream over the stream's own, as pruning
by activations takes it (Muralidharan et al., Minitron, 2024). Whole layers are judged by the loss on the text without
each: what a layer adds to the stream, which block influence (Men et al., ShortGPT, 2024) compares, says little of its
use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch

from profiler.model import ModelShape
from runtime.quantize.layers import Layer, Watched, layers_of, perplexity_of
from runtime.quantize.texts import HiddenStates
from runtime.run.prompts import TokenIds
from runtime.weights.checkpoint import Checkpoint

JUDGED_TOKENS = 4096
"""Of the text, on which layers are judged: the states of all models without one layer are held at once."""
_ADDED_SHARE = 1e-3


class Measure(StrEnum):
    """By what units are compared."""

    ACTIVATION = "activation"
    MAGNITUDE = "magnitude"  # squares of the weights
    RANDOM = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerImportance:
    """Of one layer's units."""

    channels: torch.Tensor  # [F]
    groups: torch.Tensor  # [KV]: a KV head with its query heads
    whole: float
    norm_energies: dict[str, torch.Tensor] = field(default_factory=dict)
    """[hidden] mean squares of what each norm takes in, up to a factor; none where no text was run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Of a model's units, layer by layer; hidden: of the features of the residual stream [hidden]."""

    layers: tuple[LayerImportance, ...]
    hidden: torch.Tensor
    final_norm_energies: torch.Tensor | None
    is_judged: bool = False  # layers, by the loss without each


@torch.inference_mode()
def find_importance(
    folder: Path,
    shape: ModelShape,
    measure: Measure,
    sequences: Sequence[TokenIds],
    device: torch.device,
    *,
    seed: int = 0,
    judges_layers: bool = False,
) -> Importance:
    """One layer in memory at a time. sequences: what the model runs over, for activations.

    judges_layers: by the loss without each, which runs half as many times as many layers as there are layers.
    """
    checkpoint = Checkpoint(folder, device=device, dtype=torch.float32)
    states = judge = None
    if measure is Measure.ACTIVATION:
        embedding = checkpoint.read(next(iter(shape.embedding.tensors())))
        states = HiddenStates(sequences, shape, device, torch.float32)
        states.embed(embedding)
        if judges_layers:
            judge = _Judge(sequences, shape, embedding)
    generator = torch.Generator().manual_seed(seed)
    found = []
    hidden = torch.zeros(shape.hidden_size)
    for layer in layers_of(checkpoint, shape):
        if states is not None:
            one, more = _by_activations(layer, shape, states)
        elif measure is Measure.MAGNITUDE:
            one, more = _by_magnitude(layer)
        else:
            sizes = layer.spec.dense.intermediate.count, layer.spec.attention.kv_heads.count
            channels, groups = (torch.rand(size, generator=generator) for size in sizes)
            whole = float(torch.rand((), generator=generator))
            one = LayerImportance(channels=channels, groups=groups, whole=whole)
            more = torch.rand(shape.hidden_size, generator=generator)
        found.append(one)
        hidden += more
        if judge is not None:
            judge.run(layer)
    energies = None
    if states is not None:
        energies = torch.stack([_squares(x) for x in states.states]).sum(dim=0) / states.num_tokens
    if judge is not None:
        found = _judged(found, judge.losses(checkpoint))
    return Importance(
        layers=tuple(found), hidden=hidden, final_norm_energies=energies, is_judged=judge is not None
    )  # fmt: skip


class _Judge:
    """A text on its way through the model, and through those that lack one of its layers."""

    def __init__(self, sequences: Sequence[TokenIds], shape: ModelShape, embedding: torch.Tensor) -> None:
        self.shape, chosen, tokens = shape, list[TokenIds](), 0
        for ids in sequences:
            if tokens < JUDGED_TOKENS:
                chosen.append(ids[: JUDGED_TOKENS - tokens])
                tokens += len(ids)
        self.whole = HiddenStates(chosen, shape, embedding.device, torch.float32)
        self.whole.embed(embedding)
        self.without: list[HiddenStates] = []

    def run(self, layer: Layer) -> None:
        """Through a layer, but for the model that lacks it."""
        runner = layer.runner(self.shape, layer.products())
        lacking = self.whole.copied()
        for states in (self.whole, *self.without):
            states.run(runner, layer.spec)
        self.without.append(lacking)

    def losses(self, checkpoint: Checkpoint) -> list[float]:
        """By how much the loss of a token rises without each layer."""
        whole, *without = (
            math.log(perplexity_of(states, checkpoint, self.shape)) for states in (self.whole, *self.without)
        )
        return [loss - whole for loss in without]


def _judged(layers: Sequence[LayerImportance], losses: Sequence[float]) -> list[LayerImportance]:
    """What all layers add is shared out by what removing each loses; what they add decides between those that lose
    nothing."""
    lost = [max(loss, 0.0) for loss in losses]
    scale = sum(layer.whole for layer in layers) / max(sum(lost), 1e-12)
    return [
        replace(layer, whole=scale * loss + _ADDED_SHARE * layer.whole)
        for layer, loss in zip(layers, lost, strict=True)
    ]


def _by_activations(layer: Layer, shape: ModelShape, states: HiddenStates) -> tuple[LayerImportance, torch.Tensor]:
    spec = layer.spec
    kv_heads = spec.attention.kv_heads.count
    sums = {
        "qkv": torch.zeros(shape.hidden_size),
        "gate_up": torch.zeros(shape.hidden_size),
        "down": torch.zeros(spec.dense.intermediate.count),
        "o": torch.zeros(kv_heads),
    }
    o = layer.weight(spec.attention.o).unflatten(1, (kv_heads, -1))  # [hidden, KV, H / KV * D]

    def see(name: str, x: torch.Tensor) -> None:
        if name == "o":
            parts = x.unflatten(1, (kv_heads, -1))
            energies = [float((parts[:, group] @ o[:, group].T).square().sum()) for group in range(kv_heads)]
            sums[name] += torch.tensor(energies)
        else:
            sums[name] += _squares(x)

    before = [x.clone() for x in states.states]
    watched = {name: Watched(product, partial(see, name)) for name, product in layer.products().items()}
    states.run(layer.runner(shape, watched), spec)
    after, tokens = states.states, states.num_tokens
    stream = sum(float(x.square().sum()) for x in after)
    added = sum(float((new - old).square().sum()) for new, old in zip(after, before, strict=True))
    down = layer.weight(spec.dense.down).square().sum(dim=0).cpu()
    norms = {}
    for norm, name in ((spec.before_attention, "qkv"), (spec.before_mlp, "gate_up")):
        if norm is not None:  # what it took in is what it gave, without its weight
            weight = layer.norm(norm).cpu()
            norms[norm.tensor] = sums[name] / weight.square().clamp_min(1e-12) / tokens
    importance = LayerImportance(
        channels=sums["down"] * down / stream,
        groups=sums["o"] / stream,
        whole=added / stream,
        norm_energies=norms,
    )
    return importance, (sums["qkv"] + sums["gate_up"]) / tokens


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(dim=0).cpu()


def _by_magnitude(layer: Layer) -> tuple[LayerImportance, torch.Tensor]:
    spec = layer.spec
    matrices = {linear.name: layer.weight(linear).square().cpu() for linear in spec.linears}
    gate, up = matrices["gate_up"].sum(dim=1).chunk(2)
    kv_heads = spec.attention.kv_heads.count
    groups = matrices["o"].sum(dim=0).view(kv_heads, -1).sum(dim=1)
    rows = matrices["qkv"].sum(dim=1)
    for part in torch.split(rows, [part.rows.size for part in spec.attention.qkv.parts]):
        groups = groups + part.view(kv_heads, -1).sum(dim=1)
    hidden = matrices["qkv"].sum(dim=0) + matrices["gate_up"].sum(dim=0)
    hidden += matrices["o"].sum(dim=1) + matrices["down"].sum(dim=1)
    whole = sum(float(matrix.sum()) for matrix in matrices.values())
    channels = gate + up + matrices["down"].sum(dim=0)
    return LayerImportance(channels=channels, groups=groups, whole=whole), hidden
