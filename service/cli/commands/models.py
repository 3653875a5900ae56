"""`isochunk models`: which models are run and how, and what one of them consists of."""

from __future__ import annotations

import click

from service.cli.options import json_option


@click.command(name="models")
@click.argument("model", required=False)
@json_option
def command(model: str | None, as_json: bool) -> None:
    """Which architectures are supported and how, or what MODEL consists of and what runs it.

    MODEL is a folder with a config.json, the name of a bundled shape, or a Hugging Face id in the local cache.
    """
    from service.cli.output import print_json
    from service.cli.print_models import print_model, print_supported
    from service.use_cases.models import model_report, supported

    if model is None:
        rows = supported()
        print_json(rows) if as_json else print_supported(rows)
        return
    report = model_report(model)
    print_json(report) if as_json else print_model(report)
