"""`isochunk export`: a plan as another engine's launch files."""

from __future__ import annotations

from pathlib import Path

import click

from service.cli.options import json_option
from service.cli.output import print_json, show_table

ENGINES = ("sglang", "vllm", "vllm-ascend", "trtllm", "dynamo")


@click.command(name="export")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(ENGINES), required=True, help="The engine that is to run it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Write the files to this folder.")
@json_option
def command(plan: Path, engine: str, output: Path | None, as_json: bool) -> None:
    """Write launch files of an engine for PLAN: flags, environment, layer partition and chunk settings.

    Says what the engine cannot express, and what that costs by the plan's own cost model.
    """
    from service.engines.export import Engine, export, export_json, write
    from tuner.plan.plan import load_plan

    made = export(load_plan(plan), Engine(engine))
    written = [] if output is None else write(made, output)
    if as_json:
        print_json(export_json(made) | {"written": written})
        return
    rows: list[tuple[object, ...]] = [("the plan", None, made.plan_makespan_s, 0.0)]
    rows += [
        (one.rule, one.chunk, one.makespan_s, 100 * (one.makespan_s / made.plan_makespan_s - 1)) for one in made.ruled
    ]
    show_table(("rounds by", "chunk", "predicted s", "longer %"), rows, title=f"{engine} {made.release}, by prediction")
    for name, value in made.environment.items():
        click.echo(f"{name}={value}")
    click.echo(" ".join(made.flags))
    for sentence in made.cannot:
        click.echo(f"Cannot: {sentence}")
    for path in written:
        click.echo(f"Wrote {path}")
