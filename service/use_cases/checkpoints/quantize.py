"""What `isochunk quantize` does: reads model, calibration and held-out texts, writes the checkpoint and its report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from db.errors import UserError
from service.use_cases.options import check_options, option

if TYPE_CHECKING:
    from runtime.quantize.report import QuantizeReport


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """Options of `isochunk quantize`. Raises UserError for values that are not allowed, alone or together."""

    model: str | None = option(None, "Folder with a config.json and safetensors.", flags=("MODEL",))
    output: str | None = option(None, "Folder to write, not there yet.", flags=("-o", "--output"), metavar="DIR")
    precision: str = option(
        "w8a8", "What to quantize to.", choices=("w8a16", "w8a8", "w8a8-static", "fp8", "fp8-static")
    )
    calibration: str | None = option(None, "Text, or JSONL with text or token_ids a line.", is_file=True)
    held_out: str | None = option(None, "Text or JSONL to compare the perplexity on.", is_file=True)
    smooth: float | None = option(None, "Strength of SmoothQuant, 0 to 1; 0.5 is usual.")
    observer: str = option("minmax", "How ranges end.", choices=("minmax", "percentile", "mse"))
    group_size: int | None = option(None, "Inputs that share a scale, for w8a16. [default: all]", above=0)
    asymmetric: bool = option(False, "Static int8 ranges with an offset. [default: symmetric]")
    kv: str | None = option(None, "Keys and values in 8 bits too. [default: plain]", choices=("int8", "fp8"))
    keep: str | None = option(None, "Linears that stay plain: names with wildcards.", metavar="PATTERN,...")
    device_type: str | None = option(
        None, "[default: cuda where there is one]", flags=("--device",), choices=("cpu", "cuda")
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.model is None:
            raise UserError("MODEL", "missing", "give a folder with a config.json and safetensors")
        if self.output is None:
            raise UserError("--output", "missing", "name the folder to write")
        if self.smooth is not None and not 0.0 <= self.smooth <= 1.0:
            raise UserError("--smooth", self.smooth, "must be between 0 and 1")
        if self.asymmetric and self.precision != "w8a8-static":
            raise UserError("--asymmetric", self.precision, "only w8a8-static has ranges with an offset")


def partial_of(output: Path, job: str) -> Path:
    """Where a job of the service writes the checkpoint that is moved to `output`."""
    return output.absolute().with_name(f".{output.name[:40]}.{job}.partial")


def move_what_is_whole(output: Path, job: str) -> None:
    """Move the checkpoint of a job that has ended into place, where it was ended before it did so itself."""
    with suppress(OSError):
        partial_of(output, job).rename(output)


def quantize(
    options: QuantizeOptions, progress: Callable[[int, int], None] | None = None, job: str | None = None
) -> QuantizeReport:
    """Quantize as the options say; `progress` is called with how many layers of how many are done.

    job: of the service; it ends when all is written, just before that is moved into place (`move_what_is_whole`).
    """
    import torch

    from db.rows.job_ends import JobOutcome, add_end
    from db.store.engine import open_database
    from profiler.hardware.device import check_device_type, default_device_type
    from profiler.kernels.quantized.support import check_precision
    from profiler.kernels.quantized.weight import Observer
    from profiler.model import load_model_shape, precision_of
    from profiler.model.precision import KV_FORMATS
    from runtime.quantize.quantize import check_recipe, quantize_checkpoint
    from runtime.quantize.recipe import QuantizationRecipe
    from runtime.quantize.texts import read_sequences
    from runtime.run.prompts import Tokenizer
    from runtime.weights.quantized import check_checkpoint

    source = Path(options.model or "")
    if not (source / "config.json").is_file():
        raise UserError("MODEL", options.model, "must be a folder with a config.json and safetensors")
    shape = load_model_shape(str(source))
    device_type = options.device_type or default_device_type()
    check_device_type(device_type)
    precision = precision_of(options.precision)
    check_precision(precision, device_type, field="--precision")
    assert precision.linears is not None
    recipe = QuantizationRecipe(
        linears=precision.linears,
        observer=Observer(options.observer),
        group_size=options.group_size,
        smooth=options.smooth,
        asymmetric=options.asymmetric,
        kv=None if options.kv is None else KV_FORMATS[f"kv-{options.kv}"],
        keep=tuple((options.keep or "").split(",")) if options.keep else (),
    )
    tokenizer = Tokenizer(source)
    texts = {
        flag: read_sequences(Path(path), tokenizer, shape, field=flag) if path else ()
        for flag, path in (("--calibration", options.calibration), ("--held-out", options.held_out))
    }
    check_recipe(shape, recipe, texts["--calibration"])
    check_checkpoint(source, shape, precision_of(shape.dtype))
    device = torch.device(device_type)

    def conclude(report: QuantizeReport) -> None:
        if job is not None:
            with open_database() as database, database.session() as session:
                add_end(session, job, JobOutcome(exit_code=0, result=report.to_json()))

    return quantize_checkpoint(
        source,
        Path(options.output or ""),
        replace(shape, name=options.model or shape.name),
        precision,
        recipe,
        calibration=texts["--calibration"],
        held_out=texts["--held-out"],
        device=device,
        progress=lambda layer: progress(layer + 1, shape.num_layers) if progress else None,
        partial=None if job is None else partial_of(Path(options.output or ""), job),
        conclude=conclude,
    )
