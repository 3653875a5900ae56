"""The names of the attention kernels and which is the usual best: what plans and fits need without torch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class AttentionKernel(StrEnum):
    """The kernels that can be chosen; which is fastest for a (chunk, context) is measured."""

    CPU_FLASH = "cpu-flash"  # two calls merged by log-sum-exp
    CPU_FOLDED = "cpu-folded"  # flash over the context, heads of a group folded; the diagonal in strips
    SDPA = "sdpa"  # one call with a bottom-right mask: flash on CUDA, a dense mask on a CPU
    CUDNN = "cudnn"  # two cuDNN calls merged by log-sum-exp
    CUDNN_GRAPH = "cudnn-graph"  # one cuDNN kernel with a bottom-right mask; needs nvidia-cudnn-frontend
    FLASH3 = "flash3"  # FlashAttention-3 on Hopper, with nothing to build for new sizes; needs fa3-fwd


# The usual best of those that a device has comes first.
PREFERENCE = (
    AttentionKernel.FLASH3,
    AttentionKernel.CUDNN_GRAPH,
    AttentionKernel.CUDNN,
    AttentionKernel.CPU_FOLDED,
    AttentionKernel.CPU_FLASH,
    AttentionKernel.SDPA,
)


def worth_measuring(kernels: Sequence[AttentionKernel]) -> list[AttentionKernel]:
    """Without two calls of an engine and their merge where one call does the same."""
    return [
        kernel
        for kernel in kernels
        if kernel is not AttentionKernel.CUDNN or AttentionKernel.CUDNN_GRAPH not in kernels
    ]
