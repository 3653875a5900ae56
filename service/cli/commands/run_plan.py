"""`isochunk run-plan`: execute a plan's rounds on its ranks, compare with the prediction and with Transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from service.cli.options import config_option, db_option, json_option, stall_option


@click.command(name="run-plan")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--weights", type=click.Path(path_type=Path), metavar="DIR", help="A Hugging Face checkpoint.")
@click.option("--random-weights", is_flag=True, help="Run the plan's model with random weights instead.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="JSONL: id and token_ids or text a line."
)
@click.option("--max-new-tokens", type=int, default=1, show_default=True, help="Tokens to decode for each request.")
@click.option("--check", is_flag=True, help="Compare the tokens with Transformers'; exit code 1 if they differ.")
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="FILE", help="Write a Chrome trace (opens in Perfetto)."
)
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write tokens, times and rounds as JSON."
)
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.svg", help="Draw the way from the peak to the makespan."
)
@click.option("--repeat", type=int, default=1, show_default=True, help="Passes over the rounds; the median counts.")
@click.option("--device", "device_type", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--threads-per-rank", type=int, help="Threads of one rank on a CPU. [default: the plan's]")
@click.option("--dtype", help="float32, bfloat16, w8a16, w8a8, fp8, ... [default: the plan's precision]")
@stall_option
@config_option
@db_option
@json_option
def command(plan: Path, device_type: str | None, as_json: bool, **options: Any) -> None:
    """Execute the rounds of PLAN, an isochunk.plan file, then decode greedily.

    Starts the plan's ranks on this machine; under torchrun, on any number of nodes, they are torchrun's.
    Every run leaves rows in the database: its plan, and the predicted and measured time of each round on each stage.
    """
    import os

    from db.rows.job_ends import VARIABLE
    from profiler.comm.ranks.failure import RanksFailedError
    from profiler.comm.ranks.launch import is_first_process
    from profiler.hardware.device import default_device_type
    from service.cli.output import print_json
    from service.cli.print_run import print_run
    from service.use_cases.run_plan import RunRequest, execute, write_files

    job = os.environ.get(VARIABLE)
    request = RunRequest(plan=plan, device_type=device_type or default_device_type(), job=job, **options)
    try:
        run = execute(request)
    except RanksFailedError as error:
        raise click.ClickException(str(error)) from None
    if not is_first_process():
        return
    try:
        if as_json:
            print_json(run.to_json())
        else:
            print_run(run)
    finally:  # an output that cannot be printed is no reason to lose the files
        write_files(request, run)
    if run.exit_code:
        sys.exit(run.exit_code)
