"""Triton's kernels against torch's operators, interpreted on a CPU where Triton is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.timeout(280)
@pytest.mark.parametrize("kernel", ["quantize", "rms_norm", "silu", "product", "dequantizing", "kv", "merge"])
def test_a_kernel_equals_its_reference(kernel: str) -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    program = Path(__file__).parent / "triton_checks.py"
    done = subprocess.run(
        [sys.executable, program, kernel], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=270, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "equal"
