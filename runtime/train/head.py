"""The loss over a vocabulary cut over ranks, and its gradient, block by block: logits of all tokens never stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist

from tuner.training.work import LOGITS


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningTarget:
    """What is learned: the next tokens, and a teacher's distribution over them as far as `distill_weight` says.

    The loss of a token is (1 - w) CE + w T^2 KL(teacher || student), both at temperature T in the second term (Hinton
    et al., 2015).
    """

    distill_weight: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingHead:
    """A rank's rows of the output matrix [V, hidden]: ids from `first_id` on.

    group: of the ranks that hold the others; None where one holds all.
    """

    weight: torch.Tensor
    first_id: int
    group: dist.ProcessGroup | None = None

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> this rank's logits [T, V] in float32 or more."""
        made = normed @ self.weight.T
        return made.to(torch.promote_types(made.dtype, torch.float32))

    def log_sum_exp(self, logits: torch.Tensor) -> torch.Tensor:
        """Over the vocabulary of all ranks: [T, 1]."""
        if self.group is None:
            return logits.logsumexp(dim=-1, keepdim=True)
        most = logits.amax(dim=-1, keepdim=True)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return self.sum((logits - most).exp_().sum(dim=-1, keepdim=True)).log_() + most

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x


@torch.no_grad()
def loss_and_grads(
    head: TrainingHead,
    normed: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    target: LearningTarget,
    scale: float,
    weight_grads: torch.Tensor,
    teacher: tuple[TrainingHead, torch.Tensor] | None = None,
    compiles: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """normed [T, hidden], target_ids [T] int64, -1 where there is none -> its gradient, and sums over
    tokens [2]: of the loss that is trained on, and of the cross-entropy in it.

    scale: of a token's loss in what is differentiated; gradients of the matrix are added to `weight_grads`. teacher:
    its head and its own normed hidden states [T, hidden'].
    """
    grads = torch.empty_like(normed)
    sums = torch.zeros(2, device=normed.device, dtype=torch.float64)
    factor = sums.new_full((), scale, dtype=torch.promote_types(normed.dtype, torch.float32))
    num_blocks = -(-normed.shape[0] * head.weight.shape[0] // LOGITS)
    step = -(-normed.shape[0] // num_blocks)
    for first in range(0, normed.shape[0], step):
        block = slice(first, min(first + step, normed.shape[0]))
        made, ids = normed[block] @ head.weight.T, target_ids[block]
        if teacher is None and head.group is None:
            run = _compiled() if compiles else _cross_entropy
            loss, inner = run(made, ids, factor)
            loss = torch.stack([loss, loss])
        else:
            loss, inner = _loss(head, made, ids, scale, target, teacher, block)
        torch.mm(inner, head.weight, out=grads[block])
        weight_grads += inner.T @ normed[block]
        sums += loss
    return head.sum(grads), sums


def _cross_entropy(made: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """made: logits [T, V] -> the sum over tokens, and its gradient times `scale`."""
    logits = made.to(torch.promote_types(made.dtype, torch.float32))
    counts = (ids >= 0)[:, None]
    places = ids.clamp_min(0)[:, None]
    lse = logits.logsumexp(dim=-1, keepdim=True)
    loss = ((lse - logits.gather(1, places)) * counts).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device)[None] == places
    inner = ((logits - lse).exp() - is_target.to(logits.dtype)) * (counts * scale)
    return loss, inner.to(made.dtype)


@cache
def _compiled() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_cross_entropy, dynamic=False)


def _loss(
    head: TrainingHead,
    made: torch.Tensor,
    ids: torch.Tensor,
    scale: float,
    target: LearningTarget,
    teacher: tuple[TrainingHead, torch.Tensor] | None,
    block: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_cross_entropy`, over a vocabulary that ranks share, and with a teacher: both sums [2]."""
    logits = made.to(torch.promote_types(made.dtype, torch.float32))
    counts = (ids >= 0)[:, None]
    own = ((ids >= head.first_id) & (ids < head.first_id + logits.shape[1]))[:, None]
    places = (ids - head.first_id).clamp(0, logits.shape[1] - 1)[:, None]
    lse = head.log_sum_exp(logits)
    cross_entropy = ((lse - head.sum(logits.gather(1, places).masked_fill_(~own, 0.0))) * counts).sum()
    w = target.distill_weight if teacher is not None else 0.0
    inner = (logits - lse).exp_().mul_(1.0 - w)
    inner.scatter_add_(1, places, own.to(inner.dtype) * -(1.0 - w))
    loss = (1.0 - w) * cross_entropy
    if teacher is not None and w > 0.0:
        theirs = teacher[0].logits(teacher[1][block])
        divergence, more = _distilled(head, logits, teacher[0], theirs, target)
        loss = loss + w * (divergence * counts).sum()
        inner += w * more
    return torch.stack([loss, cross_entropy]), (inner * counts * scale).to(made.dtype)


def _distilled(
    head: TrainingHead,
    logits: torch.Tensor,
    teacher: TrainingHead,
    teacher_logits: torch.Tensor,
    target: LearningTarget,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T^2 KL [T, 1] of each token, and its gradient with respect to the student's logits."""
    heat = target.temperature
    student, wanted = logits / heat, teacher_logits / heat
    student = student - head.log_sum_exp(student)
    wanted = wanted - teacher.log_sum_exp(wanted)
    shares = wanted.exp()
    divergence = head.sum((shares * (wanted - student)).sum(dim=-1, keepdim=True)) * heat * heat
    return divergence, (student.exp() - shares) * heat
