"""`isochunk tune`: fit, search, compare policies, write the best plan."""

from __future__ import annotations

from typing import Any

import click

from service.options import db_option, json_option


@click.command(name="tune")
@click.argument("model", required=False)
@click.option("--world-size", type=int, help="Ranks to plan for. [default: tp-size x pp-size, or 1]")
@click.option("--prompt-lens", metavar="N,N,...", help="Prompt lengths of the batch, in tokens.")
@click.option("--workload", type=click.Path(dir_okay=False), help="JSONL: input_length and timestamp (ms) a line.")
@click.option("--rate", type=float, default=1.0, show_default=True, help="Speed the workload's arrivals up by this.")
@click.option("--cost-model", type=click.Path(dir_okay=False), help="Plan with this cost model file instead.")
@click.option("--tp-size", type=int, help="Keep the tensor-parallel size at this.")
@click.option("--pp-size", type=int, help="Keep the number of stages at this.")
@click.option(
    "--policy", default="joint", show_default=True, help="fixed:N, gpipe, sglang, ascend, terapipe, dp, joint."
)
@click.option("--window", default="none", show_default=True, metavar="N|none", help="Rounds that may be in flight.")
@click.option("--chunk-multiple", type=int, help="Chunks end on multiples of this. [default: 64; on CUDA 256]")
@click.option("--max-round-tokens", type=int, help="Most tokens in a round.")
@click.option("--max-kv-tokens", type=int, help="Most tokens in the KV cache.")
@click.option("--objective", type=click.Choice(["makespan", "mean-ttft", "sla"]), default="makespan", show_default=True)
@click.option("--sla-ttft-s", type=float, help="Deadline of every request's TTFT, for the objective sla.")
@click.option("--max-new-tokens", type=int, default=1, show_default=True, help="Tokens to decode; counts in memory.")
@click.option("--dtype", help="float32, bfloat16 or float16. [default: the model's]")
@click.option("--device", "device_type", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--threads-per-rank", type=int, help="Threads of one rank on a CPU. [default: cores / world size]")
@click.option("--hardware", "hardware_id", type=int, help="Plan for this hardware of the database (isochunk db list).")
@click.option("--measure", type=int, metavar="N", help="Run N plans on this machine and write the best measured one.")
@click.option("--repeat", type=int, default=1, show_default=True, help="Runs of each measured plan; the median counts.")
@click.option("--correct/--no-correct", default=True, help="Correct the model by earlier runs. [default: correct]")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the best plan to this file.")
@db_option
@json_option
def command(model: str | None, as_json: bool, **options: Any) -> None:
    """Choose tensor and pipeline sizes, layer partition and rounds for MODEL.

    MODEL is a folder with a config.json or the name of a bundled shape. The cost model is fitted to the rows that
    `isochunk profile` measured; with --cost-model it is read from a file, and MODEL is not needed.
    """
    from service.output import print_json
    from service.tune_report import print_report
    from service.tuning import tune

    report = tune(model, **options, echo=None if as_json else click.echo)
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)
