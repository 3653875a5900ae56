"""8-bit products against float64, within what rounding to 8 bits can do."""

from __future__ import annotations

import pytest
import torch

from db.errors import UserError
from profiler.kernels.entry import Product
from profiler.kernels.quantized.entry import QuantizingEntry
from profiler.kernels.quantized.kv import QuantizedKV
from profiler.kernels.quantized.linear import DequantizingLinear, QuantizedLinear, make_linear
from profiler.kernels.quantized.rounding import quantize_rows, quantize_static, widened
from profiler.kernels.quantized.rows import QuantizedRows
from profiler.kernels.quantized.support import check_precision
from profiler.kernels.quantized.weight import Observer, QuantizedWeight, quantize_weight
from profiler.model import PRECISIONS

N, K = 48, 200
FORMATS = (torch.int8, torch.float8_e4m3fn)


def activations(rows: int, *, outliers: bool = False) -> torch.Tensor:
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))
    if outliers:
        x[:, 7] *= 40.0
    return x


def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(9)) * K**-0.5


def rounding_bound(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype, *, quantizes_x: bool) -> torch.Tensor:
    """The most by which each output can be off: half a step of each operand, times the other's largest sum."""
    steps = []
    for operand in (x.double(), w.double()):
        if dtype == torch.int8:  # half of the distance between neighbours, which is the scale
            steps.append(0.5 * operand.abs().amax(-1, keepdim=True).expand_as(operand) / 127.0)
        else:  # half a unit in the last of three places; subnormal numbers are 2^-9 of 448 apart
            least = operand.abs().amax(-1, keepdim=True) / 448.0 * 2.0**-10
            steps.append(torch.maximum(operand.abs() * 2.0**-4, least.expand_as(operand)))
    dx, dw = steps if quantizes_x else (torch.zeros_like(steps[0]), steps[1])
    return dx @ (w.double().abs() + dw).T + x.double().abs() @ dw.T


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 17, 130])
@pytest.mark.parametrize("precision", ["w8a16+float32", "w8a8+float32", "w8a8-static+float32", "fp8+float32"])
def test_a_product_is_within_the_error_of_its_rounding(precision: str, rows: int, outliers: bool) -> None:
    linears = PRECISIONS[precision].linears
    assert linears is not None
    x, w, bias = activations(rows, outliers=outliers), weight(), torch.randn(N)
    dtype = linears.weights.torch_dtype
    scale = x.abs().max().reshape(1) / 127.0
    linear = make_linear(quantize_weight(w, dtype), linears, bias, scale=scale if linears.is_calibrated else None)
    exact = x.double() @ w.double().T + bias
    ranged = x.abs().amax() * torch.ones(rows, K) if linears.is_calibrated else x
    bound = rounding_bound(ranged, w, dtype, quantizes_x=linears.activations is not None)
    error = (linear(x).double() - exact).abs()
    assert (error <= bound * 1.01 + 1e-5).all()
    assert error.max() > 1e-6  # it did round


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_product_equals_that_of_the_dequantized_numbers(dtype: torch.dtype) -> None:
    rows, made = quantize_rows(activations(21), dtype), quantize_weight(weight(), dtype)
    y = QuantizedLinear(made, QuantizingEntry(dtype=dtype))(rows)
    exact = (rows.values.double() * rows.scales) @ (made.values.double() * made.scales).T
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=1e-6)


def test_integer_sums_are_exact() -> None:
    ends = torch.full((5, 1024), 127, dtype=torch.int8)
    linear = QuantizedLinear(QuantizedWeight(ends, torch.ones(5, 1)), QuantizingEntry(dtype=torch.int8))
    y = linear(QuantizedRows(ends, torch.ones(5, 1), torch.float32))
    assert (y == 1024 * 127 * 127).all()


def test_an_offset_is_taken_off_in_the_product() -> None:
    x, w = activations(9).abs(), weight()  # one-sided: half of a symmetric range would be lost
    low, high = 0.0, float(x.max())
    scale, offset = torch.tensor([(high - low) / 255.0]), -128.0
    made = quantize_weight(w, torch.int8)
    entry = QuantizingEntry(dtype=torch.int8, scale=scale, offset=offset)
    exact = x.double() @ made.dequantized(torch.float64).T
    with_offset = (QuantizedLinear(made, entry)(x).double() - exact).abs()
    symmetric = QuantizingEntry(dtype=torch.int8, scale=torch.tensor([high / 127.0]))
    without = (QuantizedLinear(made, symmetric)(x).double() - exact).abs()
    bound = 0.5 * scale.double() * made.dequantized(torch.float64).abs().sum(1)
    assert (with_offset <= bound + 1e-5).all()
    assert with_offset.mean() < 0.7 * without.mean()


@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_of_zeros_stay_zeros_and_spoil_nothing(dtype: torch.dtype) -> None:
    x = activations(4)
    x[2] = 0.0
    linear = QuantizedLinear(quantize_weight(weight(), dtype), QuantizingEntry(dtype=dtype))
    y = linear(x)
    assert (y[2] == 0).all()
    assert y.isfinite().all()
    assert torch.equal(y[:2], linear(x[:2]))


def test_rows_past_a_static_range_end_at_its_ends() -> None:
    rows = quantize_static(torch.tensor([[-9.0, -1.0, 0.2, 9.0]]), torch.tensor([1.0 / 127.0]), 0.0, torch.int8)
    assert rows.values.tolist() == [[-128, -127, 25, 127]]


def test_ties_are_rounded_to_even() -> None:
    rows = quantize_static(torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]]), torch.tensor([1.0]), 0.0, torch.int8)
    assert rows.values.tolist() == [[0, 2, 2, 0, -2]]


@pytest.mark.parametrize("dtype", FORMATS)
def test_8_bit_numbers_are_widened_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    every = every[every.float().isfinite()]
    assert torch.equal(widened(every), every.float())


@pytest.mark.parametrize("precision", ["w8a16+float32", "w8a8-static+float32", "w8a8+float32", "fp8+float32"])
def test_columns_cut_for_two_ranks_are_bit_equal_and_rows_add_up(precision: str) -> None:
    linears = PRECISIONS[precision].linears
    assert linears is not None
    x, made = activations(33), quantize_weight(weight(), linears.weights.torch_dtype)
    scale = torch.tensor([4.0 / 127.0]) if linears.is_calibrated else None

    def cut(values: torch.Tensor, scales: torch.Tensor) -> Product:
        return make_linear(QuantizedWeight(values.contiguous(), scales), linears, scale=scale)

    whole = cut(made.values, made.scales)(x)
    columns = [cut(made.values[part], made.scales[part])(x) for part in (slice(0, 24), slice(24, 48))]
    assert torch.equal(torch.cat(columns, dim=1), whole)
    halves = [cut(made.values[:, part], made.scales)(x[:, part].contiguous()) for part in (slice(0, 96), slice(96, K))]
    if linears.activations is None or linears.is_calibrated:  # the same rounding: only the order of sums differs
        torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-5, atol=1e-5)
    else:  # each rank finds the range of its part, which is at most the whole's
        exact = x.double() @ made.dequantized(torch.float64).T
        error, least = (halves[0] + halves[1] - exact).norm(), (whole - exact).norm()
        assert error <= 1.05 * least


def test_groups_of_inputs_have_scales_of_their_own() -> None:
    w = weight()
    w[:, 100:] *= 50.0
    grouped, whole = quantize_weight(w, torch.int8, group_size=50), quantize_weight(w, torch.int8)
    assert grouped.scales.shape == (N, 4)
    assert (grouped.dequantized(torch.float32) - w).norm() < 0.8 * (whole.dequantized(torch.float32) - w).norm()
    x = activations(6)
    y = DequantizingLinear(grouped)(x)
    torch.testing.assert_close(y, x @ grouped.dequantized(torch.float32).T)


def test_observers_trade_the_largest_values_for_the_others() -> None:
    w = torch.randn(4, 40000, generator=torch.Generator().manual_seed(1))
    w[:, 5] = 60.0
    errors = {}
    for observer in Observer:
        made = quantize_weight(w, torch.int8, observer=observer).dequantized(torch.float32)
        errors[observer] = (made - w).square().mean().item()
    assert errors[Observer.MSE] <= errors[Observer.MINMAX]
    rest = quantize_weight(w, torch.int8, observer=Observer.PERCENTILE).dequantized(torch.float32)
    assert (rest - w)[:, 6:].square().mean() < 0.02 * errors[Observer.MINMAX]


@pytest.mark.parametrize("precision", ["w8a16", "w8a8", "fp8"])
def test_activations_in_bfloat16_give_outputs_in_bfloat16(precision: str) -> None:
    linears = PRECISIONS[precision].linears
    assert linears is not None
    x, w = activations(5).bfloat16(), weight().bfloat16()
    y = make_linear(quantize_weight(w, linears.weights.torch_dtype), linears, torch.randn(N).bfloat16())(x)
    assert y.dtype is torch.bfloat16
    assert y.shape == (5, N)


@pytest.mark.parametrize("precision", ["w8a16+float32", "w8a8-static+float32", "fp8+float32"])
def test_a_product_splits_by_outputs(precision: str) -> None:
    linears = PRECISIONS[precision].linears
    assert linears is not None
    scale = torch.tensor([4.0 / 127.0]) if linears.is_calibrated else None
    offset = -20.0 if linears.is_calibrated else 0.0
    made = quantize_weight(weight(), linears.weights.torch_dtype)
    linear, x = make_linear(made, linears, torch.randn(N), scale=scale, offset=offset), activations(12)
    assert isinstance(linear, DequantizingLinear | QuantizedLinear)
    parts = linear.split(16)
    if parts is None:  # a CPU that keeps them transposed
        assert isinstance(linear, QuantizedLinear)
        assert linear.transposed
        return
    assert torch.equal(torch.cat([part(x) for part in parts], dim=1), linear(x))
    assert parts[0](x).shape == (12, 16)


def test_a_card_without_such_products_says_which_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    for name in ("fp8", "fp8-static", "bfloat16+kv-fp8"):
        with pytest.raises(UserError) as refused:
            check_precision(PRECISIONS[name], "cuda")
        having = "float32, bfloat16, float16, w8a16, w8a8, w8a8-static"
        assert str(refused.value) == f"dtype: {name}; NVIDIA A100 has kernels for {having}"
    for name in ("w8a8", "w8a16", "bfloat16", "w8a8+kv-int8"):
        check_precision(PRECISIONS[name], "cuda")
        check_precision(PRECISIONS[name], "cpu")


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("static", [None, 0.03])
def test_keys_in_8_bits_are_off_by_half_a_step(dtype: torch.dtype, static: float | None) -> None:
    plain = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    slab = QuantizedKV.zeros((2, 20, 16), kept=dtype, dtype=torch.float32, device=torch.device("cpu"), static=static)
    slab.write(slice(4, 9), plain[:, :5])
    slab.write(torch.tensor([12, 11, 0, 19]), plain[:, 5:])
    read = slab.read(slice(0, 20))
    found = torch.cat([read[:, 4:9], read[:, [12, 11, 0, 19]]], dim=1)
    ends = plain.abs().amax(dim=-1, keepdim=True)
    step = (static or 0.0) or (ends / 127.5)
    bound = 0.51 * step if dtype == torch.int8 else plain.abs() * 2.0**-4 + (static or 0.0) * 2.0**-9 + ends * 1e-5
    assert ((found - plain).abs() <= bound + 1e-6).all()
    assert not torch.equal(found, plain)
    assert read[:, 1:4].abs().max() == 0.0
    assert torch.equal(slab[1:].read(slice(4, 9)), read[1:, 4:9])
