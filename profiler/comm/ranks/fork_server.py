"""What the fork server of ranks, and nothing else, imports first: from then on it ends when its launcher ends."""

import os

from profiler.comm.ranks.child import die_with

die_with(os.getppid())
