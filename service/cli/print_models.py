"""Prints the result of `isochunk models` as tables."""

from __future__ import annotations

from collections.abc import Sequence

import click

from service.cli.output import print_table
from service.use_cases.models import ModelReport, Supported


def print_supported(rows: Sequence[Supported]) -> None:
    """Every architecture and what runs it."""
    print_table(("architecture", "backend", ""), [(row.architecture, row.backend, row.about or None) for row in rows])


def print_model(report: ModelReport) -> None:
    """One model: a table of its kinds of layers, and what runs it."""
    if report.architecture is None:
        click.echo(f"{report.name}: {report.backend}: {report.reason}")
        return
    rows = [
        (
            one.layers,
            one.kind,
            one.parameters / 1e6,
            one.active_parameters / 1e6,
            one.kv_bytes_a_token,
            one.window_tokens,
            one.state_bytes or None,
        )
        for one in report.kinds
    ]
    columns = ("layers", "kind", "million parameters", "of these active", "KV bytes a token", "window", "state bytes")
    print_table(columns, rows, title=f"{report.name} ({report.architecture}), {report.layers} layers")
    billions = [(value or 0) / 1e9 for value in (report.parameters, report.text_parameters, report.active_parameters)]
    click.echo("Parameters: {:.2f} billion, text {:.2f}, active {:.2f}".format(*billions))
    click.echo(f"Weights: {report.format}" + (f" ({report.format_note})" if report.format_note else ""))
    click.echo(f"Run by: {report.backend}" + (f" ({report.reason})" if report.reason else ""))
