"""`isochunk prune`: make a smaller checkpoint of a model, and say what it costs and gains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from service.cli.options import json_option, options_of
from service.use_cases.checkpoints.prune import PruneOptions

if TYPE_CHECKING:
    from runtime.prune.prune import PruneReport


@click.command(name="prune")
@options_of(PruneOptions)
@json_option
def command(options: PruneOptions, as_json: bool) -> None:
    """Remove whole units of MODEL that add least: FFN channels, KV heads, layers, features of the residual stream.

    Shares say how much of each kind goes; with --speedup or --size the kinds are weighed against each other, by what
    each saves on this machine. All layers get the same sizes, which is what Transformers' configurations can say, but
    for --each-layer.
    """
    from service.cli.output import print_json
    from service.use_cases.checkpoints.prune import prune

    report = prune(options, lambda what: None if as_json else click.echo(what, err=True))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: PruneReport) -> None:
    from service.cli.output import print_table

    before, after = report.before, report.after
    rows = [
        ("layers", before.layers, after.layers),
        ("FFN channels", before.channels, after.channels),
        ("KV heads", before.kv_heads, after.kv_heads),
        ("hidden features", before.hidden, after.hidden),
        ("parameters", report.parameters_before, report.parameters_after),
        (f"GFLOP of {report.tokens} tokens", report.flops_before / 1e9, report.flops_after / 1e9),
    ]
    print_table(("unit", "before", "after"), rows, title=f"{report.model}, by {report.measure}")
    removed = ", ".join(map(str, report.removed_layers)) or "none"
    click.echo(f"layers removed: {removed}; {report.lost_importance:.1%} of what channels and heads add is lost")
    speeds = (("predicted", report.predicted_speedup), ("measured", report.measured_speedup))
    factors = [f"{value:.3f} {name}" for name, value in speeds if value is not None]
    click.echo(f"layers are so many times as fast: {', '.join(factors)}")
    if report.perplexity_before is not None and report.perplexity_after is not None:
        click.echo(f"perplexity {report.perplexity_before:.4f} before, {report.perplexity_after:.4f} after")
    shapes = "all layers have one shape, as Transformers' configurations ask for"
    if report.widths is not None:
        each = ", ".join(f"{channels}/{kv_heads}" for channels, kv_heads in report.widths)
        shapes = f"channels/KV heads by layer: {each}; Transformers does not load layers that differ"
    click.echo(f"written to {report.folder}; {shapes}")
