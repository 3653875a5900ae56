"""Makes a smaller checkpoint: without some layers, FFN channels, KV heads and their queries, or hidden features."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from db.errors import UserError
from db.files.documents import read_json
from profiler.model import ModelShape, model_from_config
from profiler.model.flops import prefill_flops
from profiler.model.shape import layer_prefix
from profiler.model.tensors import LinearSpec
from runtime.prune.budget import Losses, Sizes, Widths, cut_by_cost, cut_by_shares, cut_each_layer, layer_order
from runtime.prune.importance import Importance, Measure, find_importance
from runtime.prune.prices import ChunkWork, Prices, config_of, find_prices, measured_speedup
from runtime.quantize.layers import perplexity
from runtime.quantize.writer import CheckpointWriter
from runtime.run.prompts import TokenIds
from runtime.weights.checkpoint import Checkpoint

# Entries of a configuration that say something of each layer.
_OF_LAYERS = ("layer_types",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked for: shares to remove of each kind, or a speed-up, or a size."""

    channels: float = 0.0
    heads: float = 0.0
    layers: float = 0.0
    hidden: float = 0.0
    speedup: float | None = None
    size: float | None = None  # parameters of the layers, as a share of those before
    multiple: int = 16  # widths are multiples of it
    each_layer: bool = False  # widths differ from layer to layer, for a speed-up or a size; all layers stay

    def __post_init__(self) -> None:
        shares = {"--ffn": self.channels, "--heads": self.heads, "--layers": self.layers, "--hidden": self.hidden}
        for flag, share in shares.items():
            if not 0.0 <= share < 1.0:
                raise UserError(flag, share, "must be a share to remove, 0 to below 1")
        chosen = [any(shares.values()), self.speedup is not None, self.size is not None]
        if sum(chosen) != 1:
            raise UserError("--ffn, --heads, --layers, --hidden", "", "give shares, or --speedup, or --size")
        if self.each_layer and any(shares.values()):
            raise UserError("--each-layer", True, "goes with --speedup or --size")
        if self.speedup is not None and not 1.0 < self.speedup <= 100.0:
            raise UserError("--speedup", self.speedup, "must be above 1, at most 100")
        if self.size is not None and not 0.0 < self.size < 1.0:
            raise UserError("--size", self.size, "must be between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """A checkpoint made smaller."""

    model: str
    folder: str
    measure: str
    before: Sizes
    after: Sizes
    removed_layers: tuple[int, ...]
    lost_importance: float  # of all that channels and heads add, as a share
    parameters_before: int
    parameters_after: int
    flops_before: float  # of a prefill of `tokens`
    flops_after: float
    tokens: int
    predicted_speedup: float | None  # of the layers
    measured_speedup: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    elapsed_s: float
    widths: tuple[Widths, ...] | None = None
    """FFN channels and KV heads of each layer where they differ; `after` has the largest."""

    def to_json(self) -> dict[str, Any]:
        """All of it for programs."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Indices that stay, in their order."""

    layers: list[int]
    sizes: list[Widths]  # of every layer
    channels: list[torch.Tensor]  # of every layer
    groups: list[torch.Tensor]
    hidden: torch.Tensor | None  # None: all


def prune_checkpoint(
    source: Path,
    output: Path,
    shape: ModelShape,
    wanted: Wanted,
    *,
    measure: Measure = Measure.ACTIVATION,
    calibration: Sequence[TokenIds] = (),
    held_out: Sequence[TokenIds] = (),
    work: ChunkWork,
    seed: int = 0,
    measures_speed: bool = True,
    progress: Callable[[str], None] = lambda _what: None,
) -> PruneReport:
    """Write the model at `source` to the folder `output` with fewer units; `progress` is called with what is done.

    Importance comes from `calibration`; `held_out` judges both. work: the chunk whose speed counts. Raises `UserError`
    for what cannot be done, and leaves nothing half-written.
    """
    started = time.monotonic()
    check_wanted(shape, wanted, measure, calibration, output)
    device = work.device
    progress("importance of units")
    weighs_layers = wanted.layers > 0.0 or wanted.speedup is not None or wanted.size is not None
    importance = find_importance(
        source, shape, measure, calibration, device, seed=seed, judges_layers=weighs_layers
    )  # fmt: skip
    prices = None
    if wanted.speedup is not None or measures_speed:
        progress("prices of units")
        prices = find_prices(shape, work, multiple=wanted.multiple)
    whole, losses = Sizes.of(shape), Losses.of(importance)
    widths = None
    if wanted.each_layer:
        widths = choose_widths(shape, wanted, importance, prices)
        sizes = replace(whole, channels=max(each for each, _ in widths), kv_heads=max(each for _, each in widths))
    else:
        sizes = choose_sizes(shape, wanted, importance, prices)
    kept = _choose(shape, sizes, widths, importance)
    config = _config(source, shape, sizes, kept)
    smaller = model_from_config(config, name=output.name)
    progress("the smaller checkpoint")
    _write(source, output, shape, kept, importance, config)
    removed = tuple(sorted(set(range(shape.num_layers)) - set(kept.layers)))
    lost = losses.lost_of(whole, sizes, widths, layer_order(importance))
    chunk = [(work.chunk, work.context)]
    progress("speed and perplexity")
    return PruneReport(
        model=shape.name,
        folder=str(output),
        measure=measure,
        before=whole,
        after=sizes,
        removed_layers=removed,
        lost_importance=lost / losses.total,
        parameters_before=shape.num_parameters,
        parameters_after=smaller.num_parameters,
        flops_before=prefill_flops(shape, chunk, 1),
        flops_after=prefill_flops(smaller, chunk, 1),
        tokens=work.chunk,
        predicted_speedup=_speedup(prices, whole, sizes, widths),
        measured_speedup=measured_speedup(shape, smaller, work) if measures_speed else None,
        perplexity_before=perplexity(source, shape, held_out, device) if held_out else None,
        perplexity_after=perplexity(output, smaller, held_out, device) if held_out else None,
        elapsed_s=time.monotonic() - started,
        widths=widths,
    )


def check_wanted(
    shape: ModelShape, wanted: Wanted, measure: Measure, calibration: Sequence[TokenIds], output: Path
) -> None:
    """Raise `UserError` for what this model does not allow."""
    if output.exists():
        raise UserError("--output", output, "exists already: name a folder that does not")
    if shape.quantization is not None:
        raise UserError("MODEL", shape.name, "is quantized: prune the checkpoint that it was made from")
    if measure is Measure.ACTIVATION and not calibration:
        raise UserError("--calibration", "missing", "importance by activation needs a text to run over")
    spec = shape.layer  # refuses models whose layers differ
    shape.check_as_stored("MODEL", "pruned")
    changes_heads = wanted.heads > 0.0
    if changes_heads and spec.attention.norms_all_heads:
        raise UserError("--heads", wanted.heads, f"{shape.name} norms all heads together: none can go")
    if wanted.hidden > 0.0 and (spec.after_attention is not None or spec.after_mlp is not None):
        raise UserError("--hidden", wanted.hidden, f"{shape.name} norms what its blocks give: features must stay")


def choose_sizes(shape: ModelShape, wanted: Wanted, importance: Importance, prices: Prices | None) -> Sizes:
    """The sizes that are asked for, or those that lose least."""
    if wanted.speedup is None and wanted.size is None:
        return cut_by_shares(
            shape, channels=wanted.channels, heads=wanted.heads, layers=wanted.layers, hidden=wanted.hidden,
            multiple=wanted.multiple,
        )  # fmt: skip
    cost, most, field, value = _budget(shape, wanted, prices)
    return cut_by_cost(shape, importance, cost, most=most, multiple=wanted.multiple, field=field, value=value)


def choose_widths(
    shape: ModelShape, wanted: Wanted, importance: Importance, prices: Prices | None
) -> tuple[Widths, ...]:
    """The widths of each layer that lose least for a speed-up or a size."""
    cost, most, field, value = _budget(shape, wanted, prices)

    def of_layer(widths: Widths) -> float:
        return cost(Sizes(layers=1, channels=widths[0], kv_heads=widths[1], hidden=shape.hidden_size))

    return cut_each_layer(
        shape, importance, of_layer, most=most, multiple=wanted.multiple, field=field, value=value
    )  # fmt: skip


def _budget(
    shape: ModelShape, wanted: Wanted, prices: Prices | None
) -> tuple[Callable[[Sizes], float], float, str, float]:
    """What sizes cost, at most how much, and the option that says so."""
    whole = Sizes.of(shape)
    keeps_heads = shape.layer.attention.norms_all_heads
    cost: Callable[[Sizes], float]
    if wanted.speedup is not None:
        assert prices is not None
        cost, field, value = prices.seconds, "--speedup", wanted.speedup
        most = cost(whole) / wanted.speedup
    else:
        assert wanted.size is not None
        cost, field, value = _num_parameters(shape), "--size", wanted.size
        most = cost(whole) * wanted.size
    known = cost

    def allowed(sizes: Sizes) -> float:
        return float("inf") if keeps_heads and sizes.kv_heads < whole.kv_heads else known(sizes)

    return allowed, most, field, value


def _num_parameters(shape: ModelShape) -> Callable[[Sizes], float]:
    """Parameters of all layers of a model of some sizes."""
    spec, whole = shape.layer, Sizes.of(shape)
    of_channel = 3 * shape.hidden_size
    heads = spec.attention.heads.count // whole.kv_heads
    of_group = shape.hidden_size * spec.attention.head_dim * (2 * heads + 2)
    rest = spec.num_elements() - of_channel * whole.channels - of_group * whole.kv_heads
    return lambda sizes: sizes.layers * (of_channel * sizes.channels + of_group * sizes.kv_heads + rest)


def _speedup(prices: Prices | None, before: Sizes, after: Sizes, widths: tuple[Widths, ...] | None) -> float | None:
    if prices is None or after.hidden != before.hidden:  # no price was taken of fewer features
        return None
    if widths is None:
        return prices.seconds(before) / prices.seconds(after)
    layers = (replace(before, layers=1, channels=channels, kv_heads=kv_heads) for channels, kv_heads in widths)
    return prices.seconds(before) / sum(map(prices.seconds, layers))


def _choose(shape: ModelShape, sizes: Sizes, widths: tuple[Widths, ...] | None, importance: Importance) -> _Kept:
    removed = set(layer_order(importance)[: shape.num_layers - sizes.layers])
    hidden = None if sizes.hidden == shape.hidden_size else _best(importance.hidden, sizes.hidden)
    each = list(widths or [(sizes.channels, sizes.kv_heads)] * shape.num_layers)
    return _Kept(
        layers=[index for index in range(shape.num_layers) if index not in removed],
        sizes=each,
        channels=[_best(layer.channels, count) for layer, (count, _) in zip(importance.layers, each, strict=True)],
        groups=[_best(layer.groups, count) for layer, (_, count) in zip(importance.layers, each, strict=True)],
        hidden=hidden,
    )


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.topk(count).indices.sort().values


def _config(source: Path, shape: ModelShape, sizes: Sizes, kept: _Kept) -> dict[str, Any]:
    """The configuration of what is written: what was there, with other sizes."""
    given = dict(read_json(source / "config.json", field="MODEL"))
    sized = config_of(shape, sizes)
    names = ("num_hidden_layers", "intermediate_size", "num_key_value_heads", "num_attention_heads", "head_dim",
             "hidden_size")  # fmt: skip
    config: dict[str, Any] = given | {name: sized[name] for name in names}
    if len(set(kept.sizes)) > 1:
        group = shape.layer.attention.heads.count // shape.layer.attention.kv_heads.count
        config["intermediate_size"] = [channels for channels, _ in kept.sizes]
        config["num_key_value_heads"] = [kv_heads for _, kv_heads in kept.sizes]
        config["num_attention_heads"] = [kv_heads * group for _, kv_heads in kept.sizes]
    for name in _OF_LAYERS:
        if isinstance(given.get(name), list):
            config[name] = [given[name][index] for index in kept.layers]
    if isinstance(given.get("max_window_layers"), int):
        config["max_window_layers"] = min(given["max_window_layers"], sizes.layers)
    return config


def _write(
    source: Path,
    output: Path,
    shape: ModelShape,
    kept: _Kept,
    importance: Importance,
    config: Mapping[str, Any],
) -> None:
    checkpoint = Checkpoint(source)
    with CheckpointWriter(output, source) as writer:
        for name in shape.embedding.tensors():
            writer.add(name, _columns(checkpoint.raw(name), kept.hidden))
        for number, index in enumerate(kept.layers):
            for name, tensor in _layer_tensors(checkpoint, shape, index, kept, importance):
                writer.add(layer_prefix(number) + name, tensor)
            checkpoint.close()
        for name in shape.final_norm.tensors():
            writer.add(name, _norm(checkpoint.raw(name), kept.hidden, importance.final_norm_energies))
        for name in shape.head.tensors():
            if name not in shape.embedding.tensors():
                writer.add(name, _columns(checkpoint.raw(name), kept.hidden))
        writer.finish(dict(config))


def _layer_tensors(
    checkpoint: Checkpoint, shape: ModelShape, index: int, kept: _Kept, importance: Importance
) -> list[tuple[str, torch.Tensor]]:
    """A layer's tensors without what goes, in the format in which they lie."""
    spec, prefix = shape.layers[index], layer_prefix(index)
    attention, mlp = spec.attention, spec.dense
    group = attention.heads.count // attention.kv_heads.count
    channels, groups = kept.channels[index], kept.groups[index]
    kv_rows = _features(groups, attention.head_dim)
    q_rows = _features(groups, group * attention.head_dim)
    found: list[tuple[str, torch.Tensor]] = []
    cuts: list[tuple[LinearSpec, list[torch.Tensor | None], torch.Tensor | None]] = [
        (attention.qkv, [q_rows, kv_rows, kv_rows], kept.hidden),
        (attention.o, [kept.hidden], q_rows),
        (mlp.gate_up, [channels, channels], kept.hidden),
        (mlp.down, [kept.hidden], channels),
    ]
    for linear, rows, columns in cuts:
        pieces: dict[str, list[torch.Tensor]] = {}
        for part, mine in zip(linear.parts, rows, strict=True):
            for kind in ("weight", "bias") if linear.has_bias else ("weight",):
                whole = checkpoint.raw(f"{prefix}{part.tensor}.{kind}", _rows_of(part.first_row, part.rows.size))
                chosen = whole if mine is None else whole[mine]
                pieces.setdefault(f"{part.tensor}.{kind}", []).append(
                    _columns(chosen, columns) if kind == "weight" else chosen
                )
        found += [(name, torch.cat(parts)) for name, parts in pieces.items()]
    energies = importance.layers[index].norm_energies
    for norm in spec.norms:
        weight = checkpoint.raw(f"{prefix}{norm.tensor}.weight")
        if norm.dim.size == shape.hidden_size and norm not in (attention.q_norm, attention.k_norm):
            weight = _norm(weight, kept.hidden, energies.get(norm.tensor))
        found.append((f"{norm.tensor}.weight", weight))
    return found


def _rows_of(first: int, count: int) -> slice:
    return slice(first, first + count)


def _features(blocks: torch.Tensor, width: int) -> torch.Tensor:
    """All features of blocks."""
    return (blocks[:, None] * width + torch.arange(width)).flatten()


def _columns(tensor: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    return tensor if columns is None else tensor[:, columns]


def _norm(weight: torch.Tensor, hidden: torch.Tensor | None, energies: torch.Tensor | None) -> torch.Tensor:
    """A norm's weight over fewer features. It divides by their root mean square instead of that of all: the weight
    takes in how the two differ on the text."""
    if hidden is None:
        return weight
    factor = 1.0 if energies is None else float((energies[hidden].mean() / energies.mean()).sqrt())
    return (weight[hidden].float() * factor).to(weight.dtype)
