"""The sequences of each training step: a function of the seed and the step alone, so that a resumed run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from db.errors import UserError
from runtime.run.prompts import TokenIds
from tuner.plan.plan import Request


@dataclass(frozen=True, slots=True, eq=False)
class TokenStream:
    """All tokens of a data set one after another, cut into windows as long as the sequence that is asked for.

    Each pass over the data has an order of its own, and begins some tokens later, so that cuts fall elsewhere.
    """

    token_ids: torch.Tensor  # [N] int64
    seed: int

    @classmethod
    def of(cls, sequences: Sequence[TokenIds], requests: Sequence[Request], *, seed: int) -> TokenStream:
        """Raises `UserError` where the longest sequence of a plan does not fit in."""
        ids = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
        longest = max(request.prompt_tokens for request in requests)
        if len(ids) < longest:
            raise UserError("--data", f"{len(ids)} tokens", f"at least {longest}, the plan's longest sequence")
        return cls(ids, seed)

    def sequence(self, number: int, length: int) -> torch.Tensor:
        """Sequence `number` of all that a training takes, counted from 0: [length] int64."""
        epoch, index = divmod(number, max(1, self._num_windows(length)))
        order, shift = _order(self._num_windows(length), self._slack(length), self.seed, epoch)
        start = shift + int(order[index]) * length
        return self.token_ids[start : start + length]

    def _num_windows(self, length: int) -> int:
        return max(1, len(self.token_ids) // length - 1)

    def _slack(self, length: int) -> int:
        return len(self.token_ids) - self._num_windows(length) * length


@lru_cache(maxsize=8)
def _order(num_windows: int, slack: int, seed: int, epoch: int) -> tuple[torch.Tensor, int]:
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(num_windows, generator=generator)
    return order, int(torch.randint(0, slack + 1, (), generator=generator))
