"""What sizes cost on this machine: layers of other widths timed with the kernels of a run, in turn."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from profiler.comm.links.group import RankGroup
from profiler.kernels.attention import available_kernels
from profiler.kernels.linear import Linear
from profiler.kernels.rotary import Rotary
from profiler.layers.decoder_layer import DecoderLayer, Norms, ResidualStream, projections
from profiler.layers.prefill_inputs import prepare_round
from profiler.model import LayerSpec, ModelShape, model_from_config
from profiler.model.tensors import NormSpec
from runtime.prune.budget import Sizes

_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWork:
    """What is timed: a chunk of so many tokens after so much context, in a format on a device."""

    chunk: int
    context: int
    dtype: torch.dtype
    device: torch.device


def layer_of(shape: ModelShape, sizes: Sizes) -> LayerSpec:
    """The layer that a model of these sizes has."""
    return model_from_config(config_of(shape, sizes), name=shape.name).layer


def config_of(shape: ModelShape, sizes: Sizes) -> dict[str, object]:
    """The configuration of a model of these sizes; entries of single layers are left out."""
    attention = shape.layer.attention
    group = attention.heads.count // attention.kv_heads.count
    return dict(shape.config) | {
        "num_hidden_layers": sizes.layers,
        "intermediate_size": sizes.channels,
        "num_key_value_heads": sizes.kv_heads,
        "num_attention_heads": sizes.kv_heads * group,
        "head_dim": attention.head_dim,
        "hidden_size": sizes.hidden,
        "layer_types": None,
    }


def seconds_of(calls: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int) -> dict[str, float]:
    """Median seconds of each call, one after the other in turn.

    On a CPU the process's own time, divided by its threads: what others take of a shared machine is not in it.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    threads = torch.get_num_threads()
    for _ in range(repeats):
        for name, call in calls.items():
            if device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                end.synchronize()
                samples[name].append(begin.elapsed_time(end) * 1e-3)
            else:
                started = time.process_time()
                call()
                samples[name].append((time.process_time() - started) / threads)
    return {name: statistics.median(values) for name, values in samples.items()}


def layer_call(shape: ModelShape, spec: LayerSpec, work: ChunkWork) -> Callable[[], object]:
    """A layer of random weights over the chunk."""

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, device=work.device) * _STD).to(work.dtype)

    def norm(each: NormSpec) -> torch.Tensor:
        return torch.ones(each.dim.size, device=work.device, dtype=work.dtype)

    products = {linear.name: Linear(random(*linear.sizes())) for linear in spec.linears}
    alone = RankGroup()
    layer = DecoderLayer(
        spec, 1, norms=Norms.of(spec, norm, eps=shape.norm_eps), **projections(products),
        reduce_o=alone.reduce(None), reduce_down=alone.reduce(None), sum_ranks=alone.sum,
    )  # fmt: skip
    kernel = available_kernels(work.device, work.dtype)[0]
    inputs = prepare_round(
        [(0, work.context, work.chunk)], rotary=Rotary(shape, work.device), choose_kernel=lambda *_: kernel,
        device=work.device, dtype=work.dtype,
    )  # fmt: skip
    keys, values = random(2, spec.attention.kv_heads.count, work.context + work.chunk, spec.attention.head_dim)
    hidden = random(work.chunk, spec.hidden_size)

    @torch.inference_mode()
    def call() -> object:
        return layer(ResidualStream(hidden), inputs, keys, values).added()

    return call


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Seconds of a prefill: of each layer by its widths, and of what is not pruned."""

    widths: tuple[tuple[int, float], ...]  # channels and seconds of a layer with all heads
    groups: tuple[float, ...]  # seconds of a layer with 1, 2, ... KV heads and all channels
    rest_s: float = 0.0

    def seconds(self, sizes: Sizes) -> float:
        """Of all layers: what narrower FFN and fewer heads save adds up."""
        whole = self.groups[-1]
        saved = whole - self.groups[sizes.kv_heads - 1]
        return sizes.layers * (self._by_width(sizes.channels) - saved) + self.rest_s

    def _by_width(self, channels: int) -> float:
        for (low, low_s), (high, high_s) in zip(self.widths, self.widths[1:], strict=False):
            if channels <= high:
                return low_s + (high_s - low_s) * (channels - low) / (high - low)
        return self.widths[-1][1]


def find_prices(shape: ModelShape, work: ChunkWork, *, multiple: int, repeats: int = 15) -> Prices:
    """Time layers of several widths, and with each number of KV heads; widths between are interpolated."""
    whole = Sizes.of(shape)
    step = max(multiple, whole.channels // 8 // multiple * multiple)
    widths = sorted({multiple, whole.channels, *range(step, whole.channels, step)})
    calls = {
        f"width {width}": layer_call(shape, layer_of(shape, replace(whole, channels=width)), work) for width in widths
    }
    calls |= {
        f"heads {count}": layer_call(shape, layer_of(shape, replace(whole, kv_heads=count)), work)
        for count in range(1, whole.kv_heads)
    }
    found = seconds_of(calls, work.device, repeats=repeats)
    by_width = [found[f"width {width}"] for width in widths]
    for index in range(1, len(by_width)):  # more is never cheaper; what is timed so is noise
        by_width[index] = max(by_width[index - 1], by_width[index])
    groups = [found.get(f"heads {count}", by_width[-1]) for count in range(1, whole.kv_heads + 1)]
    for index in range(len(groups) - 2, -1, -1):
        groups[index] = min(groups[index], groups[index + 1])
    return Prices(widths=tuple(zip(widths, by_width, strict=True)), groups=tuple(groups))


def measured_speedup(before: ModelShape, after: ModelShape, work: ChunkWork, *, repeats: int = 31) -> float:
    """How many times as fast the layers of the smaller model are, timed in turn; the head's rows are few in both."""
    kinds = Counter(after.layers)
    calls = {"before": layer_call(before, before.layer, work)}
    calls |= {f"after {number}": layer_call(after, kind, work) for number, kind in enumerate(kinds)}
    found = seconds_of(calls, work.device, repeats=repeats)
    taken = sum(count * found[f"after {number}"] for number, count in enumerate(kinds.values()))
    return before.num_layers * found["before"] / taken
