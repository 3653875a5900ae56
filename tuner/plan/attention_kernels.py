"""The attention kernels of a plan: one for each piece of a chunk that a rank attends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from db.errors import UserError
from profiler.kernels.attention_kernel import AttentionKernel
from tuner.plan.stage_cost import MAX_TOKENS


@dataclass(frozen=True, kw_only=True)
class AttentionKernels:
    """Callable (tokens, context tokens) -> kernel: the usual one, but for pieces listed under another."""

    usual: AttentionKernel
    others: Mapping[AttentionKernel, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kernel, pieces in self.others.items():
            for index, (tokens, context) in enumerate(pieces):
                if not (1 <= tokens <= MAX_TOKENS and 0 <= context <= MAX_TOKENS):
                    allowed = f"[tokens, context tokens]: at least [1, 0], at most {MAX_TOKENS} each"
                    raise UserError(f"others.{kernel}[{index}]", [tokens, context], allowed)

    @cached_property
    def _of_piece(self) -> dict[tuple[int, int], AttentionKernel]:
        return {piece: kernel for kernel, pieces in self.others.items() for piece in pieces}

    def __call__(self, tokens: int, context: int) -> AttentionKernel:
        """The kernel of a piece."""
        return self._of_piece.get((tokens, context), self.usual)

    @property
    def named(self) -> tuple[AttentionKernel, ...]:
        """All kernels, the usual one first."""
        return self.usual, *self.others

    def among(self, available: Sequence[AttentionKernel]) -> AttentionKernels:
        """Without kernels that are not available: the usual one runs instead, which is the first available at worst."""
        others = {kernel: pieces for kernel, pieces in self.others.items() if kernel in available}
        return AttentionKernels(usual=self.usual if self.usual in available else available[0], others=others)

    def to_json(self) -> dict[str, Any]:
        """The `attention_kernels` object of a plan file."""
        return {"usual": self.usual, "others": {kernel: list(map(list, at)) for kernel, at in self.others.items()}}
