"""Compares one Triton kernel with its reference: `TRITON_INTERPRET=1 python triton_checks.py KERNEL [cuda]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from profiler.kernels import flash_decoding, triton_elementwise
from profiler.kernels.quantized import triton_kv, triton_product, triton_quantize, triton_weight
from profiler.kernels.quantized.kv import QuantizedKV
from profiler.kernels.quantized.rounding import quantize_rows, quantize_static, widened
from profiler.kernels.quantized.rows import QuantizedRows
from profiler.kernels.quantized.weight import quantize_weight

DEVICE = torch.device(sys.argv[2] if len(sys.argv) > 2 else "cpu")
FORMATS = (torch.int8, torch.float8_e4m3fn)
EPS = 1e-5


def random(*sizes: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ranges(*, rounds: bool = False) -> Iterator[tuple[torch.dtype, torch.dtype, torch.Tensor | None, float]]:
    """8-bit format, activations' format, static scale, offset.

    rounds: whether a kernel rounds to the activations' format: the interpreter cuts bfloat16 off, cards round.
    """
    for dtype in (torch.float32, torch.bfloat16):
        if rounds and dtype == torch.bfloat16 and DEVICE.type == "cpu":
            continue
        for fmt in FORMATS:
            yield fmt, dtype, None, 0.0
            yield fmt, dtype, torch.tensor([0.03], device=DEVICE), 0.0
        yield torch.int8, dtype, torch.tensor([0.02], device=DEVICE), -31.0


def reference(x: torch.Tensor, fmt: torch.dtype, scale: torch.Tensor | None, offset: float) -> QuantizedRows:
    """On a CPU, which divides; cards multiply by the reciprocal of a plain number."""
    made = quantize_rows(x.cpu(), fmt) if scale is None else quantize_static(x.cpu(), scale.cpu(), offset, fmt)
    return QuantizedRows(made.values.to(DEVICE), made.scales.to(DEVICE), made.dtype)


def same(found: QuantizedRows, expected: QuantizedRows, *, most_moved: float = 0.0) -> None:
    """Values equal, but for a share whose input an order of sums moved over the edge to the next value."""
    torch.testing.assert_close(found.scales, expected.scales, rtol=0.0 if most_moved == 0.0 else 1e-2, atol=0.0)
    ours, theirs = widened(found.values), widened(expected.values)
    if DEVICE.type == "cpu" and found.values.dtype == torch.float8_e4m3fn:
        # Triton's interpreter loses the carry where rounding up reaches the next power of two; cards do not.
        power = theirs.abs().log2() == theirs.abs().log2().round()
        ours, theirs = ours[~power], theirs[~power]
    moved = (ours != theirs).float().mean().item()
    assert moved <= most_moved, moved
    step: float | torch.Tensor = 1.0 if found.values.dtype == torch.int8 else theirs.abs() / 8 + 2.0**-9
    assert ((ours - theirs).abs() <= step + 1e-6).all()


def quantize() -> None:
    for fmt, dtype, scale, offset in ranges():
        x = random(5, 100, seed=1, dtype=dtype)
        x[3] = 0.0
        rows = triton_quantize.quantize(x, dtype=fmt, scale=scale, offset=offset)
        # The interpreter rounds ties to float8 away from zero, and fused multiplications and additions twice.
        ties = 0.02 if DEVICE.type == "cpu" else 0.0
        same(rows, reference(x, fmt, scale, offset), most_moved=ties)


def rms_norm() -> None:
    for fmt, dtype, scale, offset in ranges(rounds=True):
        stream, update, weight = (random(*s, seed=i, dtype=dtype) for i, s in enumerate(((7, 72), (7, 72), (72,))))
        stream[2], update[2] = 0.0, 0.0
        added = stream + update
        found, rows = triton_quantize.add_rms_norm(stream, update, weight, EPS, dtype=fmt, scale=scale, offset=offset)
        assert torch.equal(found, added)
        moved = 0.02 if dtype == torch.float32 else 0.05
        normed = F.rms_norm(added.float(), (72,), weight.float(), EPS).to(dtype)
        same(rows, reference(normed, fmt, scale, offset), most_moved=moved)
        rows = triton_quantize.rms_norm(added, weight, EPS, dtype=fmt, scale=scale, offset=offset)
        same(rows, reference(normed, fmt, scale, offset), most_moved=moved)


def silu() -> None:
    for fmt, dtype, scale, offset in ranges(rounds=True):
        x = random(6, 2 * 90, seed=4, dtype=dtype)
        gate, up = x.float().chunk(2, dim=-1)
        product = (F.silu(gate) * up).to(dtype)
        rows = triton_quantize.silu_product(x, dtype=fmt, scale=scale, offset=offset)
        same(rows, reference(product, fmt, scale, offset), most_moved=0.05)


def with_few_blocks(*kernels: Any) -> None:
    """On a card: compiling every size of block takes minutes."""
    if DEVICE.type == "cuda":
        for kernel in kernels:
            kernel.configs = kernel.configs[-2:]


def product() -> None:
    with_few_blocks(triton_product._scaled_product)
    for m, n, k in ((1, 24, 64), (19, 40, 200), (70, 136, 512)):
        for fmt, dtype, scale, offset in ranges():
            if offset or (DEVICE.type == "cuda" and dtype == torch.float32):
                continue
            rows = reference(random(m, k, seed=m, dtype=dtype), fmt, scale, 0.0)
            weight, bias = quantize_weight(random(n, k, seed=n), fmt), random(n, seed=2, dtype=dtype)
            operands = (rows.values, rows.scales, weight.values, weight.scales, bias, dtype)
            y = triton_product.scaled_product(*operands)
            exact = (widened(rows.values).double() * rows.scales) @ (widened(weight.values).double() * weight.scales).T
            # Cards add float8 products up in fewer bits.
            assert (y - (exact + bias)).norm() <= 5e-3 * (exact + bias).norm()
            if fmt == torch.int8:
                sums = (widened(rows.values).double() @ widened(weight.values).double().T).to(torch.int32)
                scaled = triton_product.dequantize_sums(sums, rows.scales, weight.scales, bias, dtype)
                torch.testing.assert_close(scaled, y, rtol=1e-2, atol=1e-3)


def dequantizing() -> None:
    with_few_blocks(triton_weight._dequantizing_product, triton_weight._few_rows, triton_weight._few_words)
    for m, n, k in ((1, 24, 64), (3, 24, 192), (19, 40, 192), (70, 136, 128)):
        for fmt in FORMATS:
            for group_size in (None, 64, 32):
                weight, bias = quantize_weight(random(n, k, seed=n), fmt, group_size=group_size), random(n, seed=2)
                x = random(m, k, seed=m)
                y = triton_weight.dequantizing_product(x, weight.values, weight.scales, bias)
                exact = x.double() @ weight.dequantized(torch.float64).T + bias
                torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)
                plain = triton_weight.dequantize(weight.values, weight.scales, torch.float32)
                assert torch.equal(plain, weight.dequantized(torch.float32))


def kv() -> None:
    """Rotated, written in 8 bits, read again; and decode, which reads 8 bits, against attention over plain numbers."""
    heads, kv_heads, dim, tokens, rows = 4, 2, 24, 5, 40
    flash_decoding.PROGRAMS = 8
    qkv = random(tokens, (heads + 2 * kv_heads) * dim, seed=1)
    angles = random(tokens, dim // 2, seed=2)
    cos, sin, places = angles.cos(), angles.sin(), torch.tensor([9, 3, 30, 31, 0], device=DEVICE)
    plain_keys, plain_values = torch.zeros(2, kv_heads, rows, dim, device=DEVICE)
    arguments = {"num_heads": heads, "query_norm": None, "key_norm": None, "eps": EPS}
    q = triton_elementwise.rotate_into_slab(qkv, cos, sin, places, plain_keys, plain_values, **arguments)
    for fmt in FORMATS:
        for static in (None, 0.02):
            keys, values = (
                QuantizedKV.zeros((kv_heads, rows, dim), kept=fmt, dtype=qkv.dtype, device=DEVICE, static=static)
                for _ in range(2)
            )
            again = triton_elementwise.rotate_into_slab(qkv, cos, sin, places, keys, values, **arguments)
            assert torch.equal(again, q)
            for slab, plain in ((keys, plain_keys), (values, plain_values)):
                expected = QuantizedKV.zeros(slab.shape, kept=fmt, dtype=qkv.dtype, device=DEVICE, static=static)
                expected.write(places, plain[:, places])
                found = [QuantizedRows(each.values.flatten(0, 1), each.scales.view(-1, 1), qkv.dtype)
                         for each in (slab, expected)]  # fmt: skip
                same(*found, most_moved=0.02)  # of the interpreter and of scales that a card's torch made
                read = triton_kv.dequantize_rows(slab.values[:, 3:33], slab.scales[:, 3:33], qkv.dtype)
                assert torch.equal(read, widened(slab.values[:, 3:33]) * slab.scales[:, 3:33, None])
            starts, lengths = (torch.tensor(each, device=DEVICE) for each in ([0, 3], [7, 37]))
            dense = [widened(slab.values) * slab.scales[..., None] for slab in (keys, values)]
            found_out = flash_decoding.attend(q[:2], keys, values, starts, lengths)
            torch.testing.assert_close(
                found_out, flash_decoding.attend(q[:2], *dense, starts, lengths), rtol=1e-4, atol=1e-5
            )


def merge() -> None:
    """Two parts of attention into one, as rows of heads and as heads of rows; a row of which one part saw nothing."""
    heads, tokens, dim = 9, 5, 24
    for dtype in (torch.float32, torch.bfloat16):
        parts = []
        for seed in (1, 2):
            rows = random(tokens, heads, dim, seed=seed, dtype=dtype)
            lse = 3.0 * random(heads, tokens, 1, seed=seed + 2)
            parts.append((rows.transpose(0, 1) if seed == 1 else rows.transpose(0, 1).contiguous(), lse))
        (first, first_lse), (second, second_lse) = parts
        first_lse[1, 2], second_lse[3, 4] = float("-inf"), float("-inf")
        share = torch.sigmoid(second_lse - first_lse)
        expected = torch.lerp(first.float(), second.float(), share)
        out, lse = torch.empty_like(expected), torch.empty_like(first_lse)
        triton_elementwise.merge_partial(first, first_lse, second, second_lse, out, lse)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, torch.logaddexp(first_lse, second_lse), rtol=1e-5, atol=1e-6)
        rows = torch.full((tokens, heads, dim), float("nan"), device=DEVICE, dtype=dtype)
        triton_elementwise.merge_partial(first, first_lse, second, second_lse, rows.transpose(0, 1), None)
        torch.testing.assert_close(rows.transpose(0, 1).float(), expected, rtol=1e-2, atol=1e-2)


if __name__ == "__main__":
    {check.__name__: check for check in (quantize, rms_norm, silu, product, dequantizing, kv, merge)}[sys.argv[1]]()
    print("equal")
