"""A stage attends with the kernels that its plan names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from profiler.kernels.attention_kernel import AttentionKernel
from runtime.job.place import Place
from runtime.run.preparation import attention_kernels
from runtime.stage.stage import KernelStage
from tests.runtime.cases import ALONE, make_job, make_plan
from tuner.plan.attention_kernels import AttentionKernels


def test_pieces_run_the_kernels_of_the_plan(checkpoint: Callable[[str], Path]) -> None:
    flash, sdpa, card = AttentionKernel.CPU_FLASH, AttentionKernel.SDPA, AttentionKernel.FLASH3
    planned = AttentionKernels(usual=sdpa, others={flash: ((60, 0),), card: ((64, 138),)})
    plan = make_plan(checkpoint("llama"), pp_size=1, attention_kernels=planned)
    job = make_job(checkpoint("llama"), pp_size=1, kernels=attention_kernels(plan, "cpu"))
    stage = KernelStage(job, Place.of(0, job.parallel), ALONE, torch.device("cpu"))
    shares = [stage.scheme.share(chunks, cut) for chunks, cut in zip(job.rounds, job.round_cuts, strict=True)]
    found = [[span.kernel for span in stage.scheme.whole_round(share).spans] for share in shares]
    assert found == [[sdpa], [flash, sdpa], [sdpa], [sdpa, sdpa]]
