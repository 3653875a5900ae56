"""Which attention kernel is taken."""

import pytest
import torch

from profiler.kernels.attention import available_kernels
from profiler.kernels.attention_kernel import PREFERENCE, AttentionKernel, worth_measuring
from profiler.points.kernel_choice import CLEARLY_FASTER, KernelChoice, KernelTime

USUAL, OTHER = AttentionKernel.CUDNN_GRAPH, AttentionKernel.SDPA


def choice(*times: tuple[AttentionKernel, int, int, float]) -> KernelChoice:
    return KernelChoice(
        [KernelTime(kernel=kernel, chunk=chunk, context=context, median_us=us) for kernel, chunk, context, us in times],
        default=USUAL,
    )


@pytest.mark.parametrize(("other_us", "expected"), [(99.0, USUAL), (94.0, USUAL), (92.0, OTHER), (30.0, OTHER)])
def test_another_kernel_must_be_clearly_faster(other_us: float, expected: AttentionKernel) -> None:
    assert 0.92 < CLEARLY_FASTER < 0.94
    assert choice((USUAL, 64, 1000, 100.0), (OTHER, 64, 1000, other_us))(64, 1000) is expected


def test_a_chunk_costs_what_the_next_larger_one_does() -> None:
    """As measured on an H100: blocks of 64 rows that split the context, against blocks of 128 that do not."""
    choose = choice(
        *((OTHER, 64, context, us) for context, us in ((0, 11.0), (32768, 152.0))),
        *((OTHER, 128, context, us) for context, us in ((0, 11.0), (32768, 285.0))),
        *((OTHER, 256, context, us) for context, us in ((0, 13.0), (32768, 556.0))),
        *((USUAL, 256, context, us) for context, us in ((0, 14.0), (32768, 501.0))),
        *((USUAL, 512, context, us) for context, us in ((0, 20.0), (32768, 511.0))),
    )
    assert [choose(chunk, 32768) for chunk in (16, 100, 128, 200, 256, 300, 512, 4096)] == [*[OTHER] * 3, *[USUAL] * 5]
    assert choose(100, 100000) is OTHER and choose(300, 100) is USUAL


def test_in_proportion_to_the_context() -> None:
    choose = choice(
        *((USUAL, 16, context, us) for context, us in ((0, 10.0), (100000, 1010.0))),
        *((OTHER, 16, context, us) for context, us in ((0, 20.0), (50000, 120.0), (100000, 220.0))),
    )
    assert choose(16, 500) is USUAL and choose(16, 5000) is OTHER and choose(16, 200000) is OTHER


def test_a_point_without_context_says_nothing_of_long_ones() -> None:
    choose = choice(
        (OTHER, 64, 0, 1.0), (USUAL, 64, 0, 2.0),
        *((OTHER, 128, context, us) for context, us in ((0, 20.0), (1000, 200.0))),
        *((USUAL, 128, context, us) for context, us in ((0, 20.0), (1000, 100.0))),
    )  # fmt: skip
    assert choose(64, 0) is OTHER and choose(64, 1000) is USUAL


def test_what_was_not_measured_is_not_taken() -> None:
    assert choice()(64, 0) is USUAL
    assert choice((OTHER, 64, 0, 1.0))(64, 0) is OTHER
    assert choice((OTHER, 64, 0, 9.0), (AttentionKernel.CUDNN, 64, 0, 10.0))(64, 0) is OTHER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_a_device_come_in_order_of_preference(dtype: torch.dtype) -> None:
    assert set(PREFERENCE) == set(AttentionKernel)
    on_cpu = available_kernels(torch.device("cpu"), dtype)
    assert on_cpu == sorted(on_cpu, key=PREFERENCE.index)
    assert (AttentionKernel.CPU_FOLDED in on_cpu) is (dtype == torch.float32)
    on_card = available_kernels(torch.device("cuda", 0), dtype)
    assert AttentionKernel.SDPA in on_card and not {k for k in on_card if k.value.startswith("cpu")}


def test_two_calls_of_an_engine_are_not_measured_beside_one_but_stay_at_hand() -> None:
    one_call, two_calls, other = AttentionKernel.CUDNN_GRAPH, AttentionKernel.CUDNN, AttentionKernel.SDPA
    assert worth_measuring([one_call, two_calls, other]) == [one_call, other]
    assert worth_measuring([two_calls, other]) == [two_calls, other]


def test_far_above_what_was_measured_the_nearer_chunk_decides() -> None:
    choose = choice(
        *((OTHER, 16, context, us) for context, us in ((0, 10.0), (100000, 300.0))),
        *((USUAL, 16, context, us) for context, us in ((0, 10.0), (100000, 900.0))),
        *((OTHER, 2048, context, us) for context, us in ((0, 100.0), (100000, 14000.0))),
        *((USUAL, 2048, context, us) for context, us in ((0, 100.0), (100000, 7000.0))),
    )
    assert choose(64, 50000) is OTHER and choose(600, 50000) is USUAL and choose(5000, 50000) is USUAL


def test_noise_does_not_make_a_long_context_cheap() -> None:
    choose = choice(
        *((OTHER, 64, context, us) for context, us in ((100, 500.0), (200, 490.0))),
        *((USUAL, 64, context, us) for context, us in ((100, 300.0), (200, 310.0))),
    )
    assert choose.expected_us(64, 20000)[OTHER] == 490.0 and choose.expected_us(64, 20000)[USUAL] > 2000.0
