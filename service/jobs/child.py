"""The process of a job: the command line, bound to the life of its worker.

`python -m service.jobs.child WORKER_PID COMMAND ARGUMENTS...`
"""

from __future__ import annotations

import sys

from profiler.comm.ranks.child import die_with

if __name__ == "__main__":
    die_with(int(sys.argv.pop(1)))
    from importlib import import_module

    # By its name: the command line is above the jobs.
    import_module("service.cli.main").main()
