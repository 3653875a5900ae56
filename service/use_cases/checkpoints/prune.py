"""What `isochunk prune` does: reads model, calibration and held-out texts, writes the smaller checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from db.errors import UserError
from service.use_cases.options import check_options, option

if TYPE_CHECKING:
    from runtime.prune.prune import PruneReport


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """Options of `isochunk prune`. Raises UserError for values that are not allowed, alone or together."""

    model: str | None = option(None, "Folder with a config.json and safetensors.", flags=("MODEL",))
    output: str | None = option(None, "Folder to write, not there yet.", flags=("-o", "--output"), metavar="DIR")
    ffn: float = option(0.0, "Share of FFN channels to remove from each layer.")
    heads: float = option(0.0, "Share of KV heads to remove, with their query heads.")
    layers: float = option(0.0, "Share of layers to remove.")
    hidden: float = option(0.0, "Share of the residual stream's features to remove.")
    speedup: float | None = option(None, "Choose sizes that make the layers so many times as fast.", above=1)
    size: float | None = option(None, "Choose sizes that leave so much of the layers' parameters.", above=0)
    each_layer: bool = option(
        False, "Widths that differ from layer to layer, with --speedup or --size. Transformers does not load them."
    )
    calibration: str | None = option(None, "Text, or JSONL with text or token_ids a line.", is_file=True)
    held_out: str | None = option(None, "Text or JSONL to compare the perplexity on.", is_file=True)
    importance: str = option("activation", "What units are compared by.", choices=("activation", "magnitude", "random"))
    multiple: int | None = option(None, "Widths are multiples of it. [default: 128 on cuda, 16 on a CPU]", above=0)
    chunk: int = option(512, "Tokens whose speed counts.", above=0)
    context: int = option(0, "Tokens before them.")
    dtype: str | None = option(None, "Format in which speed counts. [default: the model's on cuda, else float32]")
    seed: int = option(0, "Of random importance.")
    device_type: str | None = option(
        None, "[default: cuda where there is one]", flags=("--device",), choices=("cpu", "cuda")
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.model is None:
            raise UserError("MODEL", "missing", "give a folder with a config.json and safetensors")
        if self.output is None:
            raise UserError("--output", "missing", "name the folder to write")
        if self.context < 0:
            raise UserError("--context", self.context, "must be 0 or more")


def prune(options: PruneOptions, progress: Callable[[str], None] = lambda _what: None) -> PruneReport:
    """Prune as the options say; `progress` is called with what is being done."""
    import torch

    from profiler.hardware.device import check_device_type, default_device_type
    from profiler.model import load_model_shape, precision_of
    from profiler.model.precision import plain_precision
    from profiler.model.shape import default_dtype
    from runtime.prune.importance import Measure
    from runtime.prune.prices import ChunkWork
    from runtime.prune.prune import Wanted, check_wanted, prune_checkpoint
    from runtime.quantize.texts import read_sequences
    from runtime.run.prompts import Tokenizer
    from runtime.weights.quantized import check_checkpoint

    source, output = Path(options.model or ""), Path(options.output or "")
    if not (source / "config.json").is_file():
        raise UserError("MODEL", options.model, "must be a folder with a config.json and safetensors")
    device_type = options.device_type or default_device_type()
    check_device_type(device_type)
    wanted = Wanted(
        channels=options.ffn, heads=options.heads, layers=options.layers, hidden=options.hidden,
        speedup=options.speedup, size=options.size, each_layer=options.each_layer,
        multiple=options.multiple or {"cuda": 128, "cpu": 16}[device_type],
    )  # fmt: skip
    shape = replace(load_model_shape(str(source)), name=options.model or "")
    tokenizer, measure = Tokenizer(source), Measure(options.importance)
    texts = {
        flag: read_sequences(Path(path), tokenizer, shape, field=flag) if path else ()
        for flag, path in (("--calibration", options.calibration), ("--held-out", options.held_out))
    }
    check_wanted(shape, wanted, measure, texts["--calibration"], output)
    check_checkpoint(source, shape, precision_of(shape.dtype))
    dtype = plain_precision(options.dtype or default_dtype(shape, device_type), field="--dtype")
    work = ChunkWork(
        chunk=options.chunk, context=options.context, dtype=dtype.activations.torch_dtype,
        device=torch.device(device_type),
    )  # fmt: skip
    return prune_checkpoint(
        source, output, shape, wanted, measure=measure, calibration=texts["--calibration"],
        held_out=texts["--held-out"], work=work, seed=options.seed, progress=progress,
    )  # fmt: skip
