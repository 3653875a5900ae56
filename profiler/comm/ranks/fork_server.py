"""First import of the ranks' fork server: makes it end when its launcher ends."""

import os

from profiler.comm.ranks.child import die_with

die_with(os.getppid())
