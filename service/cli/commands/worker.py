"""`isochunk worker`: takes jobs of the service and runs them on this machine."""

from __future__ import annotations

import click

from service.cli.options import options_of
from service.jobs.worker_options import WorkerOptions, folders_of


@click.command(name="worker")
@options_of(WorkerOptions)
def command(options: WorkerOptions) -> None:
    """Take jobs that `isochunk serve` queued, one at a time, until this is ended.

    The worker says what hardware it has, and gets jobs for it. It needs the service's database: --db URL.
    """
    from service.jobs.log import Log
    from service.jobs.worker import describe_machine, work

    hardware = describe_machine(options.machine, options.hardware, options.device_type)
    work(options.db_url, hardware, folders_of(options.models), Log(as_json=options.log == "json"))
