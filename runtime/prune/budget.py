"""Which sizes a model is cut to: by shares that are asked for, or the least loss for a wanted speed-up or size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from db.errors import UserError
from profiler.model import ModelShape
from runtime.prune.importance import Importance

Widths = tuple[int, int]  # FFN channels and KV heads of a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is kept: layers, FFN channels and KV heads of each, and features of the residual stream."""

    layers: int
    channels: int
    kv_heads: int
    hidden: int

    @classmethod
    def of(cls, shape: ModelShape) -> Sizes:
        """All of a model."""
        spec = shape.layer
        return cls(
            layers=shape.num_layers,
            channels=spec.dense.intermediate.count,
            kv_heads=spec.attention.kv_heads.count,
            hidden=shape.hidden_size,
        )


def cut_by_shares(
    shape: ModelShape, *, channels: float, heads: float, layers: float, hidden: float, multiple: int
) -> Sizes:
    """The sizes after removing shares of each kind; widths are rounded up to a multiple of `multiple`."""
    whole = Sizes.of(shape)
    return Sizes(
        layers=max(1, round(whole.layers * (1.0 - layers))),
        channels=_width(whole.channels, channels, multiple),
        kv_heads=max(1, round(whole.kv_heads * (1.0 - heads))),
        hidden=_width(whole.hidden, hidden, multiple),
    )


def _width(size: int, share: float, multiple: int) -> int:
    return size if share == 0.0 else min(size, max(multiple, -(-round(size * (1.0 - share)) // multiple) * multiple))


@dataclass(frozen=True, slots=True)
class Losses:
    """What removing units loses, of the layers in the order in which they would go: the least important first."""

    whole: torch.Tensor  # [L] of each layer
    channels: torch.Tensor  # [L, F + 1]: of the least important so many
    groups: torch.Tensor  # [L, KV + 1]

    @classmethod
    def of(cls, importance: Importance) -> Losses:
        """Sums over units, each layer's from the least important on."""
        order = layer_order(importance)
        layers = [importance.layers[index] for index in order]
        return cls(
            torch.tensor([layer.whole for layer in layers], dtype=torch.float64),
            torch.stack([_sums(layer.channels) for layer in layers]),
            torch.stack([_sums(layer.groups) for layer in layers]),
        )

    def lost(self, removed: int, channels: int, groups: int) -> float:
        """Of removing so many layers, and so many channels and groups from each of the others."""
        kept = slice(removed, None)
        inside = self.channels[kept, channels] + self.groups[kept, groups]
        return float(self.whole[:removed].sum() + inside.sum())

    def lost_of(self, whole: Sizes, sizes: Sizes, widths: tuple[Widths, ...] | None, order: Sequence[int]) -> float:
        """Of what was chosen; order: layers from the least important on. widths: of each, where they differ."""
        if widths is None:
            removed = whole.layers - sizes.layers
            return self.lost(removed, whole.channels - sizes.channels, whole.kv_heads - sizes.kv_heads)
        return sum(
            float(self.channels[place, whole.channels - channels] + self.groups[place, whole.kv_heads - kv_heads])
            for place, (channels, kv_heads) in ((place, widths[index]) for place, index in enumerate(order))
        )

    @property
    def total(self) -> float:
        """Of removing everything."""
        return float((self.channels[:, -1] + self.groups[:, -1]).sum())


def layer_order(importance: Importance) -> list[int]:
    """Layers from the least important on. Where none was judged by the loss without it the first and the last come
    last, since all others build on their work."""
    count = len(importance.layers)
    if importance.is_judged:
        return sorted(range(count), key=lambda index: importance.layers[index].whole)
    inner = sorted(range(1, count - 1), key=lambda index: importance.layers[index].whole)
    ends = [index for index in (count - 1, 0) if 0 <= index < count]
    return inner + list(dict.fromkeys(ends))


def _sums(scores: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(scores.double().sort().values.cumsum(0), (1, 0))


def cut_by_cost(
    shape: ModelShape,
    importance: Importance,
    cost: Callable[[Sizes], float],
    *,
    most: float,
    multiple: int,
    field: str,
    value: float,
) -> Sizes:
    """The sizes that lose least among those that cost at most `most`; all layers get the same ones.

    Raises `UserError` naming `field` where none is as cheap.
    """
    whole, losses = Sizes.of(shape), Losses.of(importance)
    best: tuple[float, Sizes] | None = None
    widths = sorted({whole.channels, *range(multiple, whole.channels, multiple)}, reverse=True)
    for layers in range(whole.layers, 0, -1):
        for kv_heads in range(whole.kv_heads, 0, -1):
            for channels in widths:  # the widest that is cheap enough loses least
                sizes = Sizes(layers=layers, channels=channels, kv_heads=kv_heads, hidden=whole.hidden)
                if cost(sizes) > most:
                    continue
                lost = losses.lost(whole.layers - layers, whole.channels - channels, whole.kv_heads - kv_heads)
                if best is None or lost < best[0]:
                    best = lost, sizes
                break
    if best is None:
        raise UserError(field, value, "no sizes of this model are as cheap; embedding and head stay whole")
    return best[1]


def cut_each_layer(
    shape: ModelShape,
    importance: Importance,
    cost: Callable[[Widths], float],
    *,
    most: float,
    multiple: int,
    field: str,
    value: float,
) -> tuple[Widths, ...]:
    """Widths of each layer, all of which stay: again and again what loses least for each unit of cost that it saves.

    cost: of one layer. Raises `UserError` naming `field` where no widths are as cheap as `most`.
    """
    whole = Sizes.of(shape)
    channels = sorted({whole.channels, *range(multiple, whole.channels, multiple)})
    costs = {(width, heads): cost((width, heads)) for width in channels for heads in range(1, whole.kv_heads + 1)}
    sums = [(_sums(layer.channels), _sums(layer.groups)) for layer in importance.layers]

    def lost(index: int, widths: Widths) -> float:
        of_channels, of_groups = sums[index]
        return float(of_channels[whole.channels - widths[0]] + of_groups[whole.kv_heads - widths[1]])

    def cuts_of(index: int) -> list[Widths]:
        """What may be left of a layer: narrower, or with fewer heads."""
        now = found[index]
        narrower = [(width, now[1]) for width in channels if width < now[0]]
        narrower += [(now[0], heads) for heads in range(1, now[1])]
        return [widths for widths in narrower if costs[widths] < costs[now]]

    def next_cut(index: int) -> tuple[float, int, Widths] | None:
        """The cut of a layer that loses least for what it saves."""
        now = found[index]
        ratios = [
            ((lost(index, widths) - lost(index, now)) / (costs[now] - costs[widths]), index, widths)
            for widths in cuts_of(index)
        ]
        return min(ratios, default=None)

    found: list[Widths] = [(whole.channels, whole.kv_heads)] * whole.layers
    cuts = [next_cut(index) for index in range(whole.layers)]
    total = whole.layers * costs[found[0]]
    while total > most:
        chosen = min((cut for cut in cuts if cut is not None), default=None)
        if chosen is None:
            raise UserError(field, value, "no widths of this model's layers are as cheap")
        _, index, widths = chosen
        if total - costs[found[index]] + costs[widths] <= most:  # the last one: no further than is needed
            enough = [each for each in cuts_of(index) if total - costs[found[index]] + costs[each] <= most]
            widths = min(enough, key=lambda each: (lost(index, each), -costs[each]))
        total -= costs[found[index]] - costs[widths]
        found[index] = widths
        cuts[index] = next_cut(index)
    return tuple(found)
