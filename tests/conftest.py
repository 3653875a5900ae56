"""What all tests share: on CI, Hypothesis draws the same examples each time, so that a change is judged by itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from tests.checkpoints import write_checkpoint

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a variant, written once."""
    return cache(lambda variant: write_checkpoint(tmp_path_factory.mktemp(variant), variant))
