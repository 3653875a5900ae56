"""`isochunk train`: continue a model's training, or distil a teacher into it, on a plan's ranks, stages and chunks."""

from __future__ import annotations

import click

from service.cli.options import json_option, options_of
from service.use_cases.checkpoints.train import TrainOptions


@click.command(name="train")
@options_of(TrainOptions)
@json_option
def command(options: TrainOptions, as_json: bool) -> None:
    """Train the checkpoint in --weights on the text in --data as PLAN lays it out, and write a checkpoint.

    Weights are updated in float32, and multiplied in --precision. A training that was ended goes on from its last
    checkpoint when the same command is given again. With --teacher the distribution of that model is learned.
    """
    from service.cli.output import print_json
    from service.use_cases.checkpoints.train import train

    training = train(options, logs=not as_json)
    if as_json:
        print_json(training.to_json())
        return
    result = training.result
    last = result.records[-1]
    click.echo(
        f"loss {result.records[0].loss:.4f} at the first step, {last.loss:.4f} at the last ({len(result.records)})"
    )
    predicted = training.prediction.why and f"not predicted: {training.prediction.why}"
    if training.predicted_s is not None:
        predicted = (
            f"predicted {training.predicted_s:.4g} s ({training.predicted_s / result.seconds_a_step - 1.0:+.0%})"
        )
    mfu = "" if training.mfu is None else f", MFU {training.mfu[0]:.1%} of {training.mfu[1]}"
    click.echo(f"{result.seconds_a_step:.4g} s a step, {predicted}")
    click.echo(f"{result.tokens_a_s:.0f} tokens/s{mfu}; {result.skipped_steps} steps skipped")
    click.echo(f"written to {result.folder}")
