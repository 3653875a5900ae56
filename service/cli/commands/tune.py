"""`isochunk tune`: fit, search, plan, write the best plan."""

from __future__ import annotations

from contextlib import nullcontext

import click

from service.cli.options import config_option, json_option, options_of
from service.use_cases.tune_options import TuneOptions


@click.command(name="tune")
@options_of(TuneOptions)
@config_option
@json_option
def command(options: TuneOptions, as_json: bool) -> None:
    """Choose tensor, sequence and pipeline sizes, layer partition and rounds for MODEL, and say why.

    MODEL is a folder with a config.json or the name of a bundled shape. The cost model is fitted to the rows that
    `isochunk profile` measured; with --cost-model it is read from a file, and MODEL is not needed.
    """
    from service.cli.output import print_json, working
    from service.cli.print_tune import print_report
    from service.use_cases.tune import tune

    # What is measured would share its cores with the clock that is shown.
    with nullcontext() if options.measure else working("Planning"):
        report = tune(options, echo=None if as_json else click.echo)
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)
    if report.interrupted:
        raise SystemExit(130)
