"""Products of experts in every format against float64, within the error that their formats allow."""

from __future__ import annotations

import pytest
import torch

from profiler.experts.products import EachProduct, GroupedLinear
from profiler.kernels.quantized.linear import make_linear
from profiler.kernels.quantized.rounding import quantize_rows
from profiler.kernels.quantized.weight import QuantizedWeight, quantize_weight
from profiler.model import PRECISIONS

ROWS, OUTPUTS, INPUTS = (5, 0, 33, 1), 48, 96  # of four experts, one without rows
EPS = torch.finfo(torch.float32).eps
# Half a step of the format: of int8 relative to the row's scale, of e4m3 (three bits) relative to the number, and for
# subnormal numbers to the scale.
RELATIVE = {torch.int8: 0.0, torch.float8_e4m3fn: 2.0**-4}
STEPS = {torch.int8: 0.5, torch.float8_e4m3fn: 2.0**-10}


def half_step(x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return RELATIVE[dtype] * x.abs() + STEPS[dtype] * scales.double()


@pytest.mark.parametrize("name", ["float32", "w8a16", "w8a16 groups", "w8a8", "fp8"])
def test_products_of_rows_by_expert_are_within_the_error_of_their_formats(name: str) -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(sum(ROWS), INPUTS, generator=random)
    plain = torch.randn(len(ROWS), OUTPUTS, INPUTS, generator=random)
    ends = torch.tensor(ROWS).cumsum(0).to(torch.int32)
    exact = torch.cat([rows.double() @ w.double().t() for rows, w in zip(x.split(ROWS), plain, strict=True)])
    sums = torch.cat(
        [rows.abs().double() @ w.abs().double().t() for rows, w in zip(x.split(ROWS), plain, strict=True)]
    )  # fmt: skip
    rounding = (INPUTS + 3) * EPS * sums  # of sums in float32 (Higham, 2002, section 3.1), and of scaling
    if name == "float32":
        made = GroupedLinear(plain)(x, ends)
        assert ((made - exact).abs() <= rounding).all()
        return
    linears = PRECISIONS[name.split()[0]].linears
    assert linears is not None
    dtype = linears.weights.torch_dtype
    weights = [quantize_weight(w, dtype, group_size=32 if "groups" in name else None) for w in plain]
    product = EachProduct([make_linear(weight, linears) for weight in weights])
    made = product(x, ends).double()
    # Against the very operands that are multiplied: the rounding of sums alone.
    taken = x.double()
    if linears.activations is not None:
        rows = quantize_rows(x, dtype)
        taken = rows.values.double() * rows.scales.double()
    own = torch.cat([rows @ double(w).t() for rows, w in zip(taken.split(ROWS), weights, strict=True)])
    assert ((made - own).abs() <= 2 * rounding).all()
    # Against the plain ones: half a step of each operand besides.
    lost_w = [half_step(w.double(), steps(weight), dtype) for w, weight in zip(plain, weights, strict=True)]
    lost_x = half_step(x.double(), quantize_rows(x, dtype).scales, dtype) if linears.activations else 0.0 * x.double()
    allowed = torch.cat([
        rows.abs().double() @ lw.t() + lx @ w.abs().double().t() + lx @ lw.t()
        for rows, lx, w, lw in zip(x.split(ROWS), lost_x.split(ROWS), plain, lost_w, strict=True)
    ])  # fmt: skip
    assert ((made - exact).abs() <= allowed + 2 * rounding).all()
    assert float((made - exact).norm() / exact.norm()) < (0.05 if name == "fp8" else 0.015)


def steps(weight: QuantizedWeight) -> torch.Tensor:
    groups = weight.scales.shape[1]
    return weight.scales.repeat_interleave(INPUTS // groups, dim=1)


def double(weight: QuantizedWeight) -> torch.Tensor:
    return weight.values.double() * steps(weight).double()
