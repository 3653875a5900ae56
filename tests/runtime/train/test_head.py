"""The loss and its gradients, block by block, are those of torch over all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from runtime.train import head as module
from runtime.train.head import LearningTarget, TrainingHead, loss_and_grads


@pytest.mark.parametrize("weight", [None, 0.0, 0.7, 1.0])
def test_loss_and_gradients_are_torchs(weight: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", 500)  # blocks of ten tokens, the last one shorter
    torch.manual_seed(0)
    matrix = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    normed = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 50, (37,))
    ids[[5, 36]] = -1
    theirs = torch.randn(50, 8, dtype=torch.float64)
    states = torch.randn(37, 8, dtype=torch.float64)
    w, heat, logits, seen = weight or 0.0, 2.0, normed @ matrix.T, ids >= 0
    student, teacher = (logits / heat).log_softmax(-1)[seen], (states @ theirs.T / heat).softmax(-1)[seen]
    cross_entropy = F.cross_entropy(logits, ids, ignore_index=-1, reduction="sum")
    expected = (1.0 - w) * cross_entropy + w * heat**2 * F.kl_div(student, teacher, reduction="sum")
    torch.autograd.backward(0.1 * expected)
    weight_grads = torch.zeros(50, 16, dtype=torch.float64)
    grads, sums = loss_and_grads(
        TrainingHead(weight=matrix.detach(), first_id=0), normed.detach(), ids,
        target=LearningTarget(distill_weight=w, temperature=heat), scale=0.1, weight_grads=weight_grads,
        teacher=None if weight is None else (TrainingHead(weight=theirs, first_id=0), states),
    )  # fmt: skip
    assert sums.tolist() == pytest.approx([expected.item(), cross_entropy.item()])
    assert normed.grad is not None
    assert matrix.grad is not None
    assert torch.allclose(grads, normed.grad)
    assert torch.allclose(weight_grads, matrix.grad)
