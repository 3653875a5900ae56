"""What all tests share: on CI, Hypothesis draws the same examples each time, so that a change is judged by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import settings

from profiler.comm.ranks import launch
from tests.checkpoints import write_checkpoint

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def _imports_of_ranks() -> Iterator[None]:
    """A test process has one fork server: it imports what any rank needs, whichever is launched first."""
    modules = (
        "runtime.run.rank", "runtime.train.rank", "profiler.measure.leader", "profiler.library_layers.part",
        "torch._dynamo",  # torch.optim imports it
    )  # fmt: skip
    with patch.object(launch, "PRELOADED", (*launch.PRELOADED, *modules)):
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a variant, written once."""
    return cache(lambda variant: write_checkpoint(tmp_path_factory.mktemp(variant), variant))
