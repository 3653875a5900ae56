"""`isochunk plot`: pictures of plans, runs and traces."""

from __future__ import annotations

import click

from service.cli.options import json_option, options_of
from service.reports.plot import PlotOptions


@click.command(name="plot")
@options_of(PlotOptions)
@json_option
def command(options: PlotOptions, as_json: bool) -> None:
    """Draw FILE: a plan, what `run-plan --output` wrote, what `quantize --json` said, or a trace.

    A plan: when each stage runs what, and what a token costs by its position. A run, with --plan: the same as measured
    and predicted, and how far off each round was. A trace, with --cost-model or --plan: how TTFT is distributed under
    each policy, and throughput against TTFT over the --rates. A quantize report: how far the input of each
    linear reaches, on the calibration set and on the held-out text.
    """
    from service.cli.output import print_json, working, wrapped
    from service.reports.plot import plot

    with working("Drawing"):
        written = plot(options)
    if as_json:
        print_json(written)
        return
    for note in written.notes:
        click.echo(f"{wrapped(note)}\n")
    click.echo(f"Wrote {written.output}")
