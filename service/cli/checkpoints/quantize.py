"""`isochunk quantize`: make an 8-bit checkpoint of a model, and say what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from service.cli.options import config_option, json_option, options_of
from service.use_cases.checkpoints.quantize import QuantizeOptions

if TYPE_CHECKING:
    from runtime.quantize.report import QuantizeReport


@click.command(name="quantize")
@options_of(QuantizeOptions)
@config_option
@json_option
def command(options: QuantizeOptions, as_json: bool) -> None:
    """Quantize the linears of MODEL after training and write a compressed-tensors checkpoint.

    One layer is in memory at a time. With --calibration the layers run over those texts in full precision: static
    ranges, --smooth and the errors of outputs come from them. --held-out gives the perplexity before and after.
    """
    import os

    from db.rows.job_ends import VARIABLE
    from service.cli.output import print_json
    from service.use_cases.checkpoints.quantize import quantize

    def progress(done: int, total: int) -> None:
        click.echo(f"layer {done} of {total}", err=True)

    report = quantize(options, progress, os.environ.get(VARIABLE))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: QuantizeReport) -> None:
    from service.cli.output import show_table

    show_table(
        ("layer", "linear", "weight_error", "output_error", "input_end", "outlier_ratio"),
        [
            (one.layer, one.linear, one.weight_error, one.output_error, one.input_end, one.outlier_ratio)
            for one in report.worst()
        ],
        title=f"{report.model} in {report.precision}: the linears that lose most",
    )
    click.echo(
        f"{report.source_bytes / 2**20:.1f} MiB became {report.written_bytes / 2**20:.1f} MiB in {report.elapsed_s:.1f}"
        f" s; calibrated on {report.calibration_tokens} tokens"
    )
    if report.perplexity_loss is not None:
        click.echo(
            f"perplexity on {report.held_out_tokens} held-out tokens: {report.perplexity_before:.4f} before, "
            f"{report.perplexity_after:.4f} after ({report.perplexity_loss:+.2%})"
        )
    click.echo(f"written to {report.folder}")
