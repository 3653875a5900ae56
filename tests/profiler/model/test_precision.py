"""Precisions by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from db.errors import UserError
from profiler.model import PRECISIONS, precision_of
from profiler.model.precision import SUPPORTED


@pytest.mark.parametrize(("name", "num_bytes"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_a_plain_precision_is_one_format(name: str, num_bytes: int) -> None:
    precision = precision_of(name)
    assert precision.name == name
    assert precision.weights == precision.kv == precision.activations == precision.products == precision.reductions
    assert precision.weights.torch_dtype is getattr(torch, name)
    assert precision.weights.num_bytes(7) == 7 * num_bytes == 7 * precision.weights.torch_dtype.itemsize
    assert precision.weights.num_elements(7 * num_bytes) == 7


def test_peaks_are_those_of_the_products() -> None:
    assert precision_of("bfloat16").peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert precision_of("float32").peak_flops("NVIDIA H100 80GB HBM3") == 67e12
    assert precision_of("float32").peak_flops("AMD EPYC") is None


def test_an_unknown_precision_names_the_field_and_what_is_allowed() -> None:
    with pytest.raises(UserError) as refused:
        precision_of("int3", field="--dtype")
    assert str(refused.value) == f"--dtype: int3; supported are {SUPPORTED}"
    named = set(SUPPORTED.split(", each")[0].split(", "))
    assert {name for name in PRECISIONS if "+kv-" not in name} == named


def test_models_are_described_without_torch() -> None:
    program = "import sys, profiler.model; profiler.model.load_model_shape('qwen3-8b'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
