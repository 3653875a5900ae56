"""`isochunk profile`: measures a model's kernels and collectives on this machine, as far as they are missing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from db.errors import UserError
from service.cli.options import config_option, db_option, json_option, stall_option
from service.cli.output import print_json, show_table

if TYPE_CHECKING:
    from profiler.measure.summary import ProfileSummary

NOTHING_NEW = 3
"""Exit code of a profile that measured nothing though points are missing."""


@click.command(name="profile")
@click.argument("model", metavar="MODEL")
@click.option(
    "--backend",
    type=click.Choice(["auto", "own", "transformers"]),
    default="auto",
    show_default=True,
    help="What runs its layers: kernels here, or Transformers where these lack something.",
)
@click.option("--world-size", type=click.IntRange(min=1), help="Ranks to start. [default: one a card; 2 on a CPU]")
@click.option(
    "--tp-sizes", metavar="N,...", help="Tensor-parallel degrees to measure. [default: those that split WORLD_SIZE]"
)
@click.option(
    "--sp-sizes",
    metavar="N,...",
    help="Sequence-parallel degrees to measure finely, beside each tensor-parallel one. [default: coarsely]",
)
@click.option(
    "--context-length",
    type=click.IntRange(min=1),
    help="Longest prompt to cover. [default: the model's, at most 8192 on a CPU and 131072 on CUDA]",
)
@click.option("--dtype", help="float32, bfloat16, w8a16, w8a8, fp8, ... [default: the model's; with float32 on a CPU]")
@click.option("--device", "device_type", help="cpu or cuda. [default: cuda where there is one]")
@click.option("--threads-per-rank", type=click.IntRange(min=1), help="[default: the cores shared out]")
@click.option("--budget-s", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Measure for so long.")
@click.option(
    "--remeasure", type=click.Choice(["noisy", "all"]), help="Measure again what is kept: noisy points, or all."
)
@stall_option
@config_option
@db_option
@json_option
def command(
    model: str,
    backend: str,
    world_size: int | None,
    tp_sizes: str | None,
    sp_sizes: str | None,
    context_length: int | None,
    dtype: str | None,
    device_type: str | None,
    threads_per_rank: int | None,
    budget_s: float,
    remeasure: str | None,
    stall_timeout_s: float | None,
    db_url: str | None,
    as_json: bool,
) -> None:
    """Measure MODEL on this machine: a folder with a config.json, or a bundled shape such as llama-3-8b.

    Only what the database does not hold yet is measured, coarse to fine; interrupted, it goes on where it was. Exit
    code 3 if points are missing and none could be measured.
    """
    if not math.isfinite(budget_s):
        raise UserError("--budget-s", budget_s, "must be a finite number of seconds, 0 or more")
    from profiler.comm.ranks.failure import RanksFailedError
    from profiler.comm.ranks.stall import LEAST_LIMIT_S
    from profiler.measure.profile import ProfileOptions, profile_model

    options = ProfileOptions(
        model=model,
        backend=backend,
        world_size=world_size,
        tp_sizes=tp_sizes,
        sp_sizes=sp_sizes,
        context_length=context_length,
        dtype=dtype,
        device_type=device_type,
        threads_per_rank=threads_per_rank,
        budget_s=budget_s,
        remeasure=remeasure,
        db_url=db_url,
        stall_timeout_s=stall_timeout_s or LEAST_LIMIT_S,
    )
    try:
        summary = profile_model(options)
    except RanksFailedError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        print_json(summary)
    else:
        _print(summary)
    if summary.interrupted:
        raise SystemExit(130)
    if summary.num_missing and not summary.num_new:
        raise SystemExit(NOTHING_NEW)


def _print(summary: ProfileSummary) -> None:
    show_table(
        ("op", "points", "new", "noisy", "missing", "fastest_us", "slowest_us"),
        [
            (op.op, op.num_points, op.num_new, op.num_noisy, op.num_missing, op.fastest_us, op.slowest_us)
            for op in summary.ops
        ],
        title=f"{summary.model} {summary.dtype} on {summary.hardware.device}, "
        f"{summary.world_size} ranks, {summary.elapsed_s:.0f} s",
    )
    for note in summary.notes:
        click.echo(note)
