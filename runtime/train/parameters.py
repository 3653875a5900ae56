"""The parameters that a rank trains: its slices of the checkpoint, fused as they run, with where each belongs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from profiler.model import ModelShape
from profiler.model.shape import layer_prefix
from profiler.model.tensors import Cut, LinearSpec, NormSpec
from runtime.job.place import Place
from runtime.weights.checkpoint import WeightSource


@dataclass(slots=True, kw_only=True, eq=False)
class Parameter:
    """A tensor that a rank trains.

    weight: in the format in which it is multiplied, a leaf of autograd. master: the same in float32, which is updated;
    None where nothing is. grads: the sum of the gradients of all chunks, in float32. sums_ranks: whether each
    tensor-parallel rank has but its part of the gradient.
    """

    name: str
    weight: torch.Tensor
    source: LinearSpec | NormSpec
    prefix: str
    is_bias: bool = False
    is_cut: bool = False  # each tensor-parallel rank holds another part
    sums_ranks: bool = False
    master: torch.Tensor | None = None
    grads: torch.Tensor | None = None

    def keep_grads(self, *, by_hand: bool = False) -> None:
        """Sum the gradient of every backward in `grads`, and free what autograd left; `by_hand`: others add to them."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.grads = torch.zeros_like(self.weight, dtype=wide, requires_grad=False)
        if not by_hand:
            self.weight.requires_grad_(True)
            self.weight.register_post_accumulate_grad_hook(self._keep)

    def _keep(self, weight: torch.Tensor) -> None:
        assert self.grads is not None and weight.grad is not None
        self.grads += weight.grad
        weight.grad = None


class Reader:
    """Reads parameters of a rank."""

    def __init__(self, checkpoint: WeightSource, place: Place, dtype: torch.dtype, *, keeps_master: bool) -> None:
        self.checkpoint, self.dtype, self.keeps_master = checkpoint, dtype, keeps_master
        self.tp_rank, self.tp_size = place.tp_rank, place.parallel.tp_size

    def layer(self, shape: ModelShape, index: int) -> dict[str, Parameter]:
        """All of a layer, by the name within it: `qkv`, `qkv.bias`, or a norm's name in the checkpoint."""
        spec, prefix = shape.layers[index], layer_prefix(index)
        found = {}
        for linear in spec.linears:
            found[linear.name] = self.matrix(linear, prefix)
            if linear.has_bias:
                found[f"{linear.name}.bias"] = self.bias(linear, prefix)
        for norm in spec.norms:
            found[norm.tensor] = self.norm(norm, prefix)
        for name in (spec.attention.q_norm, spec.attention.k_norm):  # of each head: ranks hold different heads
            if name is not None and name.cut is Cut.REPLICATED:
                found[name.tensor].sums_ranks = self.tp_size > 1
        return found

    def matrix(self, spec: LinearSpec, prefix: str = "") -> Parameter:
        """The rank's weight [n, k]."""
        slices = list(spec.slices(self.tp_rank, self.tp_size))
        parts = [self.checkpoint.read(f"{prefix}{part.tensor}.weight", part.rows, part.columns) for part in slices]
        is_cut = spec.cut is not Cut.REPLICATED and self.tp_size > 1
        return self._parameter(f"{prefix}{spec.name}", torch.cat(parts), spec, prefix, is_cut=is_cut)

    def bias(self, spec: LinearSpec, prefix: str = "") -> Parameter:
        """The rank's bias [n], whole where the inputs are cut."""
        slices = list(spec.slices(self.tp_rank, self.tp_size))
        parts = [self.checkpoint.read(f"{prefix}{part.tensor}.bias", part.rows) for part in slices]
        is_cut = spec.cut is Cut.COLUMN and self.tp_size > 1
        return self._parameter(f"{prefix}{spec.name}.bias", torch.cat(parts), spec, prefix, is_bias=True, is_cut=is_cut)

    def norm(self, spec: NormSpec, prefix: str = "") -> Parameter:
        """The rank's part of a norm's weight."""
        weight = self.checkpoint.read(f"{prefix}{spec.tensor}.weight", spec.rows(self.tp_rank, self.tp_size))
        is_cut = spec.cut is Cut.COLUMN and self.tp_size > 1
        return self._parameter(f"{prefix}{spec.tensor}", weight, spec, prefix, is_cut=is_cut)

    def _parameter(
        self,
        name: str,
        weight: torch.Tensor,
        source: LinearSpec | NormSpec,
        prefix: str,
        *,
        is_bias: bool = False,
        is_cut: bool = False,
    ) -> Parameter:
        wide = weight.float() if self.keeps_master else None
        return Parameter(
            name=name, weight=(weight if wide is None else wide).detach().to(self.dtype), master=wide, source=source,
            prefix=prefix, is_bias=is_bias, is_cut=is_cut,
        )  # fmt: skip


def checkpoint_tensors(parameter: Parameter, parts: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors that a parameter is made of, whole; parts: of all tensor-parallel ranks, in order.

    Parts of one tensor of the checkpoint come as one, in their order.
    """
    source, prefix = parameter.source, parameter.prefix
    kind = "bias" if parameter.is_bias else "weight"
    if isinstance(source, NormSpec):
        yield f"{prefix}{source.tensor}.weight", torch.cat(parts) if parameter.is_cut else parts[0]
        return
    if source.cut is Cut.ROW and not parameter.is_bias:
        whole = torch.cat(parts, dim=1) if parameter.is_cut else parts[0]
        yield f"{prefix}{source.parts[0].tensor}.weight", whole
        return
    tp_size = len(parts) if parameter.is_cut else 1
    pieces: dict[str, list[torch.Tensor]] = {}
    firsts = [0] * tp_size
    for part in source.parts:
        for rank in range(tp_size):
            rows = part.rows.of_rank(rank, tp_size)
            count = rows.stop - rows.start
            pieces.setdefault(part.tensor, []).append(parts[rank][firsts[rank] : firsts[rank] + count])
            firsts[rank] += count
    for tensor, rows_of in pieces.items():
        yield f"{prefix}{tensor}.{kind}", torch.cat(rows_of)
