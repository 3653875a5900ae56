"""Which attention kernel is taken."""

import pytest
import torch

from profiler.attention import PREFERENCE, AttentionKernel, available_kernels
from profiler.kernel_choice import CLEARLY_FASTER, KernelChoice, KernelTime

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


def test_the_nearest_contest_decides() -> None:
    choose = choice(
        (USUAL, 16, 0, 10.0), (OTHER, 16, 0, 5.0), (USUAL, 2048, 0, 100.0), (OTHER, 2048, 0, 150.0)
    )  # fmt: skip
    assert choose(32, 0) is OTHER and choose(1500, 0) is USUAL


def test_a_kernel_that_ran_alone_decides_nothing() -> None:
    assert choice((OTHER, 64, 0, 1.0))(64, 0) is USUAL
    assert choice()(64, 0) is USUAL


def test_where_the_usual_kernel_did_not_run_the_fastest_is_taken() -> None:
    choose = choice((OTHER, 64, 0, 9.0), (AttentionKernel.CUDNN, 64, 0, 10.0))
    assert choose(64, 0) is OTHER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_a_device_come_in_order_of_preference(dtype: torch.dtype) -> None:
    assert set(PREFERENCE) == set(AttentionKernel)
    on_cpu = available_kernels(torch.device("cpu"), dtype)
    assert on_cpu == sorted(on_cpu, key=PREFERENCE.index)
    assert (AttentionKernel.CPU_FOLDED in on_cpu) is (dtype == torch.float32)
    on_card = available_kernels(torch.device("cuda", 0), dtype)
    assert AttentionKernel.SDPA in on_card and not {k for k in on_card if k.value.startswith("cpu")}
