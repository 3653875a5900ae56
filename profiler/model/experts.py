"""Mixtures of experts: which experts a token goes to, how they lie in a checkpoint, and which of them a rank holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import comb
from typing import TypedDict

from profiler.model.mlp import DenseMLP
from profiler.model.precision import Precision
from profiler.model.tensors import Cut, Dim, LinearSpec, NormSpec, TensorPart

EXPERTS = "experts"  # the matrices of all of them, as those who keep linears plain name them


class Scoring(StrEnum):
    """How a router's logits become weights."""

    SOFTMAX = "softmax"  # over all experts, before the choice
    SIGMOID = "sigmoid"
    CHOSEN = "softmax of the chosen"  # over those that a token goes to


class Dispatch(StrEnum):
    """How rows come to experts on other ranks."""

    NONE = "none"
    """All ranks of a tensor-parallel group have all rows; their sum combines what the experts of each made."""
    ALL_TO_ALL = "all-to-all"
    """Ranks that share the rows of a round send each row to its experts, and get its sum back."""


class ExpertSpread(TypedDict):
    """Where experts lie, as arguments of `spread`: see `ExpertsMLP`."""

    ep_size: int
    beside: int
    dispatch: Dispatch


def expert_spread(ep_size: int, dispatch: Dispatch, sp_size: int) -> ExpertSpread:
    """Of a layout whose `sp_size` ranks beside the tensor-parallel group share the rows, if there are any."""
    if dispatch is Dispatch.ALL_TO_ALL and sp_size > 1:
        return ExpertSpread(ep_size=1, beside=sp_size, dispatch=dispatch)
    return ExpertSpread(ep_size=ep_size, beside=1, dispatch=dispatch)


class ExpertGate(StrEnum):
    """What an expert does between its two products."""

    SILU = "silu"  # silu of the gate times up
    CLAMPED = "clamped"  # gpt-oss: both within a limit, gate * sigmoid(alpha gate) times up + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Chooses `per_token` experts by the logits of `gate`.

    bias: is added to scores for the choice alone. groups: of experts, of which a token's best ones are open to it, by
    the sum of the `best_of_group` best scores of each. normalized: whether weights add up to 1, before they are scaled.
    """

    gate: LinearSpec
    per_token: int
    scoring: Scoring = Scoring.SOFTMAX
    normalized: bool = True
    scale: float = 1.0
    bias: NormSpec | None = None
    groups: int = 1
    groups_per_token: int = 1
    best_of_group: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTensors:
    """Where experts lie in a checkpoint.

    names: of gate, up and down of one expert, `{}` standing for its number; or, of all, of gate|up [experts, hidden,
    2 features], pair by pair, and down [experts, features, hidden]. has_bias: then both have one.
    """

    names: tuple[str, ...]
    has_bias: bool = False

    @property
    def is_stacked(self) -> bool:
        """Whether all experts are one tensor."""
        return len(self.names) == 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsMLP:
    """Routed experts, each a gated MLP of `features`, and a shared one that every token goes to.

    ep_size: groups of a tensor-parallel group's ranks among which experts are spread; within such a group the features
    of each are cut. 1 cuts them over all ranks.
    beside: ranks beside the group, each with rows of its own, among which they are spread besides.
    dispatch: whether rows are sent to them. Where the group's own rows are cut and sent, shared experts are whole.
    kept, group_size: of the experts' matrices, as of a `LinearSpec`.
    """

    router: Router
    experts: Dim
    hidden: Dim
    features: Dim
    tensors_of: ExpertTensors
    gate: ExpertGate = ExpertGate.SILU
    alpha: float = 1.0
    limit: float = 0.0
    shared: DenseMLP | None = None
    shared_gate: LinearSpec | None = None
    ep_size: int = field(default=1, repr=False)
    beside: int = field(default=1, repr=False)
    dispatch: Dispatch = field(default=Dispatch.NONE, repr=False)
    kept: bool = field(default=False, repr=False)
    group_size: int | None = field(default=None, repr=False)

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Products that every token goes through."""
        shared = () if self.shared is None else (self.shared.gate_up, self.shared.down)
        gate = () if self.shared_gate is None else (self.shared_gate,)
        return self.router.gate, *shared, *gate

    @property
    def num_groups(self) -> int:
        """Groups of ranks that experts are spread over."""
        return self.ep_size * self.beside

    @property
    def owners(self) -> list[int]:
        """For each expert the group that holds it."""
        held = [self.experts.of_rank(group, self.num_groups) for group in range(self.num_groups)]
        return [group for group, experts in enumerate(held) for _ in range(experts.start, experts.stop)]

    def held(self, tp_rank: int, tp_size: int, sp_rank: int = 0) -> tuple[slice, slice]:
        """The experts of a rank, and of each the features."""
        cut, beside = tp_size // self.ep_size, sp_rank if self.beside > 1 else 0
        return (
            self.experts.of_rank(beside * self.ep_size + tp_rank // cut, self.num_groups),
            self.features.of_rank(tp_rank % cut, cut),
        )

    def spread(self, ep_size: int, *, beside: int = 1, dispatch: Dispatch = Dispatch.NONE) -> ExpertsMLP:
        """The same spread so."""
        shared = self.shared
        if shared is not None and dispatch is Dispatch.ALL_TO_ALL and beside == 1:
            whole = (replace(linear, cut=Cut.REPLICATED) for linear in (shared.gate_up, shared.down))
            shared = replace(shared, gate_up=next(whole), down=next(whole))
        return replace(self, shared=shared, ep_size=ep_size, beside=beside, dispatch=dispatch)

    @property
    def sent_share(self) -> float:
        """The share of rows that some expert of the fullest group is chosen for, all experts being as likely.

        A row goes to a group once, however many of its experts it is for.
        """
        count, per_token = self.experts.count, self.router.per_token
        return 1.0 - comb(count - self.experts.per_rank(self.num_groups), per_token) / comb(count, per_token)

    def sizes(self, tp_size: int) -> dict[str, int]:
        """Of a rank's part, as the rows of `experts` name them."""
        return {
            "held": self.experts.per_rank(self.num_groups),
            "experts": self.experts.count,
            "per_token": self.router.per_token,
            "features": self.features.per_rank(tp_size // self.ep_size),
        }

    def matrices(self, expert: int) -> tuple[LinearSpec, LinearSpec]:
        """gate|up and down of an expert with tensors of its own, cut over the ranks that share it."""
        gate, up, down = (name.format(expert) for name in self.tensors_of.names)
        name, both = f"{EXPERTS}.{expert}", (TensorPart(gate, self.features), TensorPart(up, self.features))
        made = (
            LinearSpec(name=f"{name}.gate_up", cut=Cut.COLUMN, parts=both, inputs=self.hidden),
            LinearSpec(name=f"{name}.down", cut=Cut.ROW, parts=(TensorPart(down, self.hidden),), inputs=self.features),
        )
        first, second = (replace(each, kept=self.kept, group_size=self.group_size) for each in made)
        return first, second

    def matrix_bytes(self, precision: Precision, tp_size: int = 1) -> int:
        """Bytes of the matrices of the experts that a rank holds, with the scales of those in 8 bits."""
        sizes, hidden = self.sizes(tp_size), self.hidden.size
        each = ((2 * sizes["features"], hidden), (hidden, sizes["features"]))
        one = sum(precision.matrix_bytes(n, k, kept=self.kept, group_size=self.group_size) for n, k in each)
        return sizes["held"] * one

    def matrix_elements(self, tp_size: int = 1) -> int:
        """Numbers in the matrices of the experts that a rank holds."""
        sizes = self.sizes(tp_size)
        return 3 * sizes["held"] * sizes["features"] * self.hidden.size

    def num_elements(self, tp_size: int = 1) -> int:
        """The same with their biases and the router's."""
        sizes = self.sizes(tp_size)
        biases = sizes["held"] * (2 * sizes["features"] + self.hidden.size) if self.tensors_of.has_bias else 0
        choice = 0 if self.router.bias is None else self.router.bias.num_elements()
        return self.matrix_elements(tp_size) + biases + choice

    def active_elements(self, tp_size: int = 1) -> int:
        """Numbers of routed experts that a rank multiplies and adds for each token, in the mean."""
        return 3 * self.router.per_token * self.features.size * self.hidden.size // (tp_size * self.beside)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the checkpoint's tensors, those of `linears` left out."""
        count, hidden, features = self.experts.count, self.hidden.size, self.features.size
        found: dict[str, tuple[int, ...]] = {}
        if self.tensors_of.is_stacked:
            gate_up, down = self.tensors_of.names
            found |= {gate_up: (count, hidden, 2 * features), down: (count, features, hidden)}
            if self.tensors_of.has_bias:
                found |= {f"{gate_up}_bias": (count, 2 * features), f"{down}_bias": (count, hidden)}
        else:
            for expert in range(count):
                for matrix in self.matrices(expert):
                    found |= matrix.tensors()
        return found if self.router.bias is None else found | self.router.bias.tensors()
