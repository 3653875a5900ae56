"""Products of plain rows with 8-bit weights as Triton kernels: weights become plain numbers on their way in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from profiler.kernels.quantized.triton_launch import begin, early, tuned
from profiler.kernels.quantized.triton_product import GROUP_ROWS, block_place, bucket, grid

MOST_FEW = 4  # rows up to which a product only reads its weights: each is used too rarely for matrix instructions

# One group of inputs a step, so that its scale is applied to whole partial sums: no block is longer than a group.
# Larger blocks of rows gave wrong sums on an H200 with Triton 3.6: left operands that become plain in registers were
# overwritten while a product still read them.
_DEQUANTIZING = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in (
        (64, 128, 4, 4),
        (32, 128, 4, 5),
        (16, 128, 4, 5),
        (16, 64, 4, 5),
    )
]
_FEW = [
    triton.Config({"BLOCK_N": n, "BLOCK_K": k, "DOT": dot, "STAGES": stages}, num_warps=warps)
    for n, k, dot, warps, stages in (
        (16, 512, True, 1, 4),
        (16, 256, True, 1, 6),
        (32, 512, True, 2, 4),
        (32, 256, True, 4, 6),
        (64, 256, True, 4, 4),
        (16, 1024, True, 2, 3),
        (4, 1024, False, 4, 4),
        (8, 512, False, 4, 4),
        (16, 256, False, 4, 5),
        (8, 512, False, 4, 1),
        (4, 512, False, 2, 4),
    )
]

_WORDS = [
    triton.Config({"BLOCK_N": n, "BLOCK_W": words, "STAGES": stages}, num_warps=warps)
    for n, words, warps, stages in (
        (8, 64, 1, 4),
        (4, 128, 1, 4),
        (4, 128, 2, 3),
        (8, 128, 2, 3),
        (4, 256, 2, 3),
        (8, 256, 4, 3),
    )
]
_WORD_BYTES = 4


def dequantizing_product(
    x: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [M, K] plain, weight [N, K] in 8 bits, weight_scales [N, G] -> [M, N] in x's dtype; sums in float32."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty((m, n), device=x.device, dtype=x.dtype)
    if m == 0:
        return out
    groups = weight_scales.shape[1]
    added = bias if bias is not None else weight_scales
    if m <= MOST_FEW and groups == 1 and weight.dtype == torch.int8 and in_words(weight):
        words = weight.view(torch.int32)
        _few_words[lambda meta: (triton.cdiv(n, meta["BLOCK_N"]),)](
            x, words, out, weight_scales, added, m, n, k, x.stride(0), words.stride(0),
            HAS_BIAS=bias is not None, ROWS=triton.next_power_of_2(m), **early(m),
        )  # fmt: skip
        return out
    if m <= MOST_FEW:
        _few_rows[lambda meta: (triton.cdiv(n, meta["BLOCK_N"]),)](
            x, weight, out, weight_scales, added, m, n, k, groups, k // groups, x.stride(0), weight.stride(0),
            HAS_BIAS=bias is not None, GROUPED=groups > 1, ROWS=triton.next_power_of_2(m),
        )  # fmt: skip
        return out
    _dequantizing_product[grid(m, n)](
        x, weight, out, weight_scales, added, m, n, k, groups, k // groups, x.stride(0), weight.stride(0), bucket(m),
        BLOCK_K=64 if groups == 1 or k // groups % 64 == 0 else 16 if k // groups % 32 else 32,
        HAS_BIAS=bias is not None, GROUPED=groups > 1, EVEN=k % 64 == 0, GROUP_ROWS=GROUP_ROWS,
    )  # fmt: skip
    return out


def in_words(weight: torch.Tensor) -> bool:
    """Whether rows of 8-bit numbers are rows of 32-bit words too."""
    sizes = weight.shape[1], weight.stride(0), weight.storage_offset()
    return weight.stride(1) == 1 and all(size % _WORD_BYTES == 0 for size in sizes)


def dequantize(weight: torch.Tensor, weight_scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight [N, K] in 8 bits, weight_scales [N, G] -> the plain weight [N, K]: read once, written once."""
    n, k = weight.shape
    groups = weight_scales.shape[1]
    out = torch.empty((n, k), device=weight.device, dtype=dtype)
    _dequantize[(n, triton.cdiv(k, 4096))](
        weight, out, weight_scales, k, groups, k // groups, weight.stride(0), GROUPED=groups > 1, BLOCK=4096,
        num_warps=8,
    )  # fmt: skip
    return out


@tuned(_DEQUANTIZING, ["n", "k", "group_size", "bucket"])
@triton.jit(do_not_specialize=["m", "bucket"])
def _dequantizing_product(
    x, weight, out, weight_scales, bias, m, n, k, groups, group_size, x_stride, weight_stride, bucket,
    HAS_BIAS: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The result is computed transposed: Hopper's products take their left operand from registers, where weights have
    # just become plain, and their right one only from shared memory.
    row, column = block_place(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_ROWS)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    at = tl.arange(0, BLOCK_K)
    x_at = x + (rows % m).to(tl.int64)[None, :] * x_stride + at[:, None]
    weight_at = weight + (columns % n).to(tl.int64)[:, None] * weight_stride + at[None, :]
    scale_at = weight_scales + (columns % n).to(tl.int64) * groups
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = at < k - start
        if EVEN:
            right = tl.load(x_at)
            left = tl.load(weight_at).to(right.dtype)
        else:
            right = tl.load(x_at, mask=inside[:, None], other=0.0)
            left = tl.load(weight_at, mask=inside[None, :], other=0.0).to(right.dtype)
        if GROUPED:
            scale = tl.load(scale_at + start // group_size)
            sums += tl.dot(left, right, input_precision="ieee") * scale[:, None]
        else:
            sums = tl.dot(left, right, sums, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if not GROUPED:
        sums = sums * tl.load(scale_at)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    inside = (columns < n)[:, None] & (rows < m)[None, :]
    to = out + rows.to(tl.int64)[None, :] * n + columns[:, None]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside)


@tuned(_FEW, ["n", "k", "group_size", "ROWS"], suits=None)
@triton.jit(do_not_specialize=["m"])
def _few_rows(
    x, weight, out, weight_scales, bias, m, n, k, groups, group_size, x_stride, weight_stride,
    HAS_BIAS: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # With few programs on a multiprocessor each needs several blocks on their way: memory is all that this waits for.
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.arange(0, BLOCK_K)
    weight_at = weight + (columns % n).to(tl.int64)[:, None] * weight_stride
    scale_at = weight_scales + (columns % n).to(tl.int64) * groups
    taken: tl.constexpr = 16 if DOT else ROWS  # rows that a matrix instruction takes at least
    rows = tl.arange(0, taken)
    if DOT:
        sums = tl.zeros((BLOCK_N, taken), dtype=tl.float32)
    else:
        sums = tl.zeros((taken, BLOCK_N, BLOCK_K), dtype=tl.float32)  # added up over the inputs once, at the end
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        here = start + at
        inside = (rows < m)[:, None] & (here < k)[None, :]
        inputs = tl.load(x + rows[:, None] * x_stride + here[None, :], mask=inside, other=0.0)
        numbers = tl.load(weight_at + here[None, :], mask=(here < k)[None, :], other=0.0)
        if GROUPED:
            scale = tl.load(scale_at[:, None] + (here // group_size)[None, :], mask=(here < k)[None, :], other=0.0)
            numbers = numbers.to(tl.float32) * scale
        if DOT:
            sums = tl.dot(numbers.to(inputs.dtype), tl.trans(inputs), sums, input_precision="ieee")
        else:
            sums += numbers.to(tl.float32)[None, :, :] * inputs.to(tl.float32)[:, None, :]
    total = tl.trans(sums) if DOT else tl.sum(sums, axis=2)
    if not GROUPED:
        total = total * tl.load(scale_at)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    to = out + rows[:, None] * n + columns[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


@tuned(_WORDS, ["n", "k", "ROWS"], suits=None)
@triton.jit(do_not_specialize=["m"])
def _few_words(
    x, words, out, weight_scales, bias, m, n, k, x_stride, word_stride,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    # A byte b in the last place of 2**23 is 2**23 + b, which takes no conversion: a card turns integers to floats at a
    # fraction of its rate of additions. On an H200 large weights come in at 3.4 instead of 2.9 TB/s.
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.arange(0, BLOCK_W)
    rows = tl.arange(0, ROWS)
    word_at = words + (columns % n).to(tl.int64)[:, None] * word_stride
    sums = tl.zeros((ROWS, BLOCK_N, BLOCK_W), dtype=tl.float32)
    for start in tl.range(0, k // 4, BLOCK_W, num_stages=STAGES):
        here = start + at
        inside = here < k // 4
        packed = tl.load(word_at + here[None, :], mask=inside[None, :], other=0) ^ -0x7F7F7F80  # each byte + 128
        for byte in tl.static_range(4):
            bits = ((packed >> (8 * byte)) & 0xFF) | 0x4B000000
            numbers = bits.to(tl.float32, bitcast=True) - (2.0**23 + 128.0)
            taken = (rows < m)[:, None] & inside[None, :]
            inputs = tl.load(x + rows[:, None] * x_stride + (4 * here + byte)[None, :], mask=taken, other=0.0)
            sums += numbers[None, :, :] * inputs.to(tl.float32)[:, None, :]
    total = tl.sum(sums, axis=2) * tl.load(weight_scales + columns % n)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    to = out + rows[:, None] * n + columns[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def _dequantize(
    weight, out, weight_scales, k, groups, group_size, weight_stride, GROUPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < k
    numbers = tl.load(weight + row * weight_stride + at, mask=inside, other=0.0).to(tl.float32)
    if GROUPED:
        numbers *= tl.load(weight_scales + row * groups + at // group_size, mask=inside, other=0.0)
    else:
        numbers *= tl.load(weight_scales + row)
    tl.store(out + row * k + at, numbers.to(out.dtype.element_ty), mask=inside)
