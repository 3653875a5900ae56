"""The plan: requests, chunks, rounds, the parallel layout, and its file, isochunk.plan/3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from db.errors import UserError
from db.files.documents import located, of_schema, parse, read_json, write_json
from profiler.model.experts import Dispatch, ExpertSpread, expert_spread
from profiler.sequence.kind import CUTS, SequenceCut, SPKind, round_cuts
from tuner.plan.attention_kernels import AttentionKernels
from tuner.plan.stage_cost import MAX_SECONDS, MAX_TOKENS
from tuner.plan.stage_order import StageOrder, stages_of_groups

SCHEMA = "isochunk.plan/3"
SCHEMA_2 = "isochunk.plan/2"  # without attention kernels
SCHEMA_1 = "isochunk.plan/1"  # without sequence parallelism and virtual stages
MAX_REQUESTS = 65_536
MAX_ROUNDS = 100_000
MAX_WINDOW = 1_000_000
MAX_THREADS = 4096
MAX_WEIGHT = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to prefill."""

    id: str
    prompt_tokens: int
    cached_tokens: int = 0
    """Tokens at the prompt's start whose KV is already there; they are context, not work."""
    arrival_s: float = 0.0
    weight: float = 1.0
    """Weight of its TTFT in the mean-ttft objective."""
    sla_ttft_s: float | None = None
    """Deadline of its TTFT, counted from its arrival."""
    output_tokens: int = 1
    """Tokens of its answer; those after the first are decoded beside other requests' rounds (`serving.answers`)."""
    sla_tpot_s: float | None = None
    """Limit of its TPOT: seconds from its first token to its last, over the tokens after the first."""
    priority: str | None = None
    """Name of its class."""

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise UserError("prompt_tokens", self.prompt_tokens, "at least 1")
        if self.prompt_tokens > MAX_TOKENS:
            raise UserError("prompt_tokens", self.prompt_tokens, f"at most {MAX_TOKENS}")
        if not 0 <= self.cached_tokens < self.prompt_tokens:
            allowed = f"0 to {self.prompt_tokens - 1} (a prompt runs at least its last token)"
            raise UserError("cached_tokens", self.cached_tokens, allowed)
        if not 0.0 <= self.arrival_s <= MAX_SECONDS:
            allowed = f"a finite number of seconds, at least 0 and at most {MAX_SECONDS:g}, is needed"
            raise UserError("arrival_s", self.arrival_s, allowed)
        if not 0.0 <= self.weight <= MAX_WEIGHT:
            raise UserError("weight", self.weight, f"a number of at least 0 and at most {MAX_WEIGHT:g} is needed")
        for name in ("sla_ttft_s", "sla_tpot_s"):
            limit_s = getattr(self, name)
            if limit_s is not None and not 0.0 < limit_s <= MAX_SECONDS:
                allowed = f"a finite number of seconds above 0, at most {MAX_SECONDS:g}, is needed"
                raise UserError(name, limit_s, allowed)
        if not 1 <= self.output_tokens <= MAX_TOKENS:
            raise UserError("output_tokens", self.output_tokens, f"1 to {MAX_TOKENS}")

    @property
    def new_tokens(self) -> int:
        """Tokens that must run."""
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """`tokens` consecutive tokens of a request from token `start` on (cached ones counted), run in one round."""

    request: int
    start: int
    tokens: int

    @property
    def end(self) -> int:
        """The request's token after the chunk's last."""
        return self.start + self.tokens


Round = tuple[Chunk, ...]


class Weights(StrEnum):
    """Where the weights of a layer are, among the ranks of a sequence-parallel group."""

    WHOLE = "whole"
    """On each of them."""
    GATHERED = "gathered"
    """Cut over them, and gathered a layer ahead of use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """How many ranks share what: `pp_size` stages, each held by sp_size x tp_size ranks.

    Under Megatron's sequence parallelism the tensor-parallel group cuts the rows, and `sp_size` is 1.
    """

    tp_size: int
    pp_size: int
    sp_size: int = 1
    sp_kind: SPKind = SPKind.NONE
    virtual_stages: int = 1
    stage_order: StageOrder = StageOrder.LOOP
    weights: Weights = Weights.WHOLE
    ep_size: int = 1
    """Groups of ranks among which experts are spread: of a tensor-parallel group, 1 cutting each expert over all of its
    ranks; or the ranks that share the rows, where those are sent to their experts."""
    dispatch: Dispatch = Dispatch.NONE

    @property
    def num_groups(self) -> int:
        """Groups of consecutive layers that a round goes through."""
        return self.pp_size * self.virtual_stages

    @property
    def world_size(self) -> int:
        """Ranks that take part."""
        return self.pp_size * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks that hold a stage together."""
        return self.sp_size * self.tp_size

    @property
    def sequence_size(self) -> int:
        """Ranks of a stage that share the rows of a round."""
        return self.tp_size if self.sp_kind is SPKind.MEGATRON else self.sp_size

    @property
    def spread(self) -> ExpertSpread:
        """Where experts lie, as `ModelShape.spread` takes it."""
        return expert_spread(self.ep_size, self.dispatch, self.sp_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel(Degrees):
    """How the model is spread: its degrees, and the layers of each group in the order in which rounds go through them.

    A stage holds `virtual_stages` groups of consecutive layers.
    """

    layer_partition: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size", "sp_size", "virtual_stages", "ep_size"):
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "at least 1")
        if len(self.layer_partition) != self.num_groups:
            of = f"stage (pp_size is {self.pp_size})"
            if self.virtual_stages > 1:
                of = f"group (pp_size x virtual_stages is {self.num_groups})"
            raise UserError("layer_partition", list(self.layer_partition), f"one number of layers a {of}")
        if any(layers < 1 for layers in self.layer_partition):
            raise UserError("layer_partition", list(self.layer_partition), "at least one layer a stage")
        if self.sp_kind is SPKind.MEGATRON and self.tp_size == 1:
            raise UserError("sp_kind", self.sp_kind, "cuts over the tensor-parallel group: tp_size must be 2 or more")
        own_ranks = self.sp_kind not in (SPKind.NONE, SPKind.MEGATRON)
        if own_ranks and self.sp_size == 1:
            raise UserError("sp_size", 1, f"2 or more with sp_kind {self.sp_kind}")
        if not own_ranks and self.sp_size > 1:
            allowed = f"1 with sp_kind {self.sp_kind}; gather, ulysses and ring take ranks of their own"
            raise UserError("sp_size", self.sp_size, allowed)
        if self.dispatch is Dispatch.ALL_TO_ALL:
            if self.sequence_size == 1:
                raise UserError("dispatch", self.dispatch, "none, where no ranks share the rows: sp_kind is none")
            if self.ep_size != self.sequence_size:
                allowed = f"{self.sequence_size} with dispatch all-to-all, the ranks that share the rows"
                raise UserError("ep_size", self.ep_size, allowed)
        elif self.tp_size % self.ep_size:
            raise UserError("ep_size", self.ep_size, f"must divide tp_size = {self.tp_size}, whose ranks hold experts")
        if self.weights is Weights.GATHERED and self.sp_size == 1:
            raise UserError("weights", self.weights, "are gathered over a sequence-parallel group: sp_size 2 or more")

    @property
    def stage_of_group(self) -> tuple[int, ...]:
        """The stage that holds each group."""
        return stages_of_groups(self.pp_size, self.virtual_stages, self.stage_order)

    def to_json(self) -> dict[str, Any]:
        """The `parallel` object of a plan file."""
        names = ("tp_size", "pp_size", "sp_size", "sp_kind", "virtual_stages", "stage_order", "weights")
        spread: dict[str, Any] = {"ep_size": self.ep_size} if self.ep_size > 1 else {}
        spread |= {"dispatch": self.dispatch} if self.dispatch is not Dispatch.NONE else {}
        named = {name: getattr(self, name) for name in names}
        return named | spread | {"layer_partition": list(self.layer_partition)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedFor:
    """What a plan was made for."""

    objective: str = "makespan"
    """The name of an objective (`tuner.workload.objective`)."""
    max_makespan_increase: float | None = None
    """Share of the least makespan that could be given up for another objective; None where there was no limit."""

    def __post_init__(self) -> None:
        if self.max_makespan_increase is not None and not self.max_makespan_increase >= 0.0:
            raise UserError(
                "tuned_for.max_makespan_increase", self.max_makespan_increase, "a share of at least 0 is needed"
            )

    def to_json(self) -> dict[str, Any]:
        """The `tuned_for` object of a plan file."""
        most = self.max_makespan_increase
        return {"objective": self.objective} | ({} if most is None else {"max_makespan_increase": most})


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """What is predicted if one thing was better."""

    change: str
    makespan_s: float
    sought: float | None = None
    """The figure of the objective that the plan was tuned for: seconds, or the share of the deadlines met; None where
    that is the makespan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the cost model expects of the plan."""

    makespan_s: float
    lower_bound_s: float | None = None
    gap: float | None = None
    ttft_s: tuple[float, ...] = ()
    planning_s: float | None = None
    round_s: tuple[tuple[float, ...], ...] | None = None
    """[round][group] seconds of each round in each group of layers (a stage, where it holds one)."""
    uncertainty: float | None = None
    """Relative error to expect of makespan_s, from the fit's residuals."""
    round_kinds: Mapping[str, tuple[float, ...]] | None = None
    """Of each round by kind of work (`tuner.waterfall.steps.Kind`), seconds in the mean over the stages."""
    moves: tuple[WhatIf, ...] = ()
    """Changes that would bring most of what the plan was tuned for, the largest gain first."""

    def __post_init__(self) -> None:
        if not 0.0 < self.makespan_s <= MAX_SECONDS:
            raise UserError("makespan_s", self.makespan_s, f"seconds above 0, at most {MAX_SECONDS:g}, are needed")
        for index, row in enumerate(self.round_s or ()):
            if not all(0.0 <= seconds <= MAX_SECONDS for seconds in row):
                raise UserError(f"round_s[{index}]", list(row), f"seconds from 0 to {MAX_SECONDS:g} are needed")

    def to_json(self) -> dict[str, Any]:
        """The `predicted` object of a plan file; what is not known is left out."""
        out = {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) is not None}
        out["ttft_s"] = list(self.ttft_s)
        if self.round_s is not None:
            out["round_s"] = [list(row) for row in self.round_s]
        if self.round_kinds is not None:
            out["round_kinds"] = {kind: list(seconds) for kind, seconds in self.round_kinds.items()}
        out["moves"] = [
            {"change": move.change, "makespan_s": move.makespan_s}
            | ({} if move.sought is None else {"sought": move.sought})
            for move in self.moves
        ]
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A complete plan: what to run, on what layout, in which rounds; checked when it is made."""

    model: Mapping[str, Any]
    precision: str
    parallel: Parallel
    requests: tuple[Request, ...]
    rounds: tuple[Round, ...]
    window: int | None = None
    threads_per_rank: int | None = None
    """Threads of one rank on a CPU that the prediction holds for."""
    predicted: Predicted | None = None
    policy: str | None = None
    tuned_for: TunedFor | None = None
    cost_model: Mapping[str, Any] | None = None
    cuts: tuple[SequenceCut, ...] = ()
    """How each round is cut among the ranks that share its rows; left out, as usual for the kind."""
    attention_kernels: AttentionKernels | None = None
    """The kernels that the prediction holds for; left out, the usual best of the device runs."""

    def __post_init__(self) -> None:
        check_window(self.window)
        allowed_cuts = CUTS[self.parallel.sp_kind]
        if len(self.cuts) not in (0, len(self.rounds)):
            raise UserError("cuts", f"{len(self.cuts)} entries", f"one for each of {len(self.rounds)} rounds, or none")
        for index, cut in enumerate(self.cuts):
            if cut not in allowed_cuts:
                allowed = f"with sp_kind {self.parallel.sp_kind} one of {', '.join(allowed_cuts)}"
                raise UserError(f"cuts[{index}]", cut, allowed)
        if self.threads_per_rank is not None and not 1 <= self.threads_per_rank <= MAX_THREADS:
            raise UserError("threads_per_rank", self.threads_per_rank, f"at least 1, at most {MAX_THREADS}")
        check_rounds(self.requests, self.rounds)
        given = len(self.predicted.ttft_s) if self.predicted else 0
        if given not in (0, len(self.requests)):
            allowed = f"one for each of {len(self.requests)} requests, or none"
            raise UserError("predicted.ttft_s", f"{given} values", allowed)

    @property
    def round_cuts(self) -> tuple[SequenceCut, ...]:
        """How each round is cut."""
        return round_cuts(self.parallel.sp_kind, self.cuts, len(self.rounds))

    def to_json(self) -> dict[str, Any]:
        """The content of an isochunk.plan/3 file."""
        out: dict[str, Any] = {
            "schema": SCHEMA,
            "model": dict(self.model),
            "precision": self.precision,
            "parallel": self.parallel.to_json(),
            "window": self.window,
            "requests": [_request_to_json(request) for request in self.requests],
            "rounds": [[{"request": c.request, "start": c.start, "tokens": c.tokens} for c in r] for r in self.rounds],
        }
        if self.threads_per_rank is not None:
            out["threads_per_rank"] = self.threads_per_rank
        if self.predicted is not None:
            out["predicted"] = self.predicted.to_json()
        if self.policy is not None:
            out["policy"] = self.policy
        if self.tuned_for is not None:
            out["tuned_for"] = self.tuned_for.to_json()
        if self.cost_model is not None:
            out["cost_model"] = dict(self.cost_model)
        if self.cuts:
            out["cuts"] = list(self.cuts)
        if self.attention_kernels is not None:
            out["attention_kernels"] = self.attention_kernels.to_json()
        return out

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Read the content of an isochunk.plan/3, /2 or /1 file; unknown fields are ignored. Raises UserError."""
        content = of_schema(data, SCHEMA, SCHEMA_2, SCHEMA_1)
        if content["schema"] != SCHEMA:
            content = {name: value for name, value in content.items() if name != "attention_kernels"}
        if content["schema"] == SCHEMA_1:
            content = _without_sequence(content)
        requests = content.get("requests")
        if isinstance(requests, list):
            content = content | {"requests": [_with_id(index, entry) for index, entry in enumerate(requests)]}
        return parse(cls, content)


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan file. Raises UserError naming the field, its value and what is allowed."""
    content = read_json(path, field="plan")
    with located(path):
        return Plan.from_json(content)


def save_plan(path: str | Path, plan: Plan) -> None:
    """Write a plan file, atomically."""
    write_json(path, plan.to_json())


def check_window(window: int | None) -> None:
    """Raise UserError unless `window` is None (unlimited) or a number of rounds."""
    if window is not None and not 1 <= window <= MAX_WINDOW:
        raise UserError("window", window, f"at least 1 round, at most {MAX_WINDOW}, or null for no limit")


def check_rounds(requests: Sequence[Request], rounds: Sequence[Round]) -> None:
    """Raise UserError unless the rounds run every new token of every request exactly once and in order."""
    if not requests:
        raise UserError("requests", "[]", "at least one request is needed")
    for name, given, most in (("requests", requests, MAX_REQUESTS), ("rounds", rounds, MAX_ROUNDS)):
        if len(given) > most:
            raise UserError(name, f"{len(given)} entries", f"at most {most}")
    done = [request.cached_tokens for request in requests]
    for i, chunks in enumerate(rounds):
        if not chunks:
            raise UserError(f"rounds[{i}]", "[]", "at least one chunk a round is needed")
        seen: set[int] = set()
        for j, chunk in enumerate(chunks):
            where = f"rounds[{i}][{j}]"
            if not 0 <= chunk.request < len(requests):
                raise UserError(f"{where}.request", chunk.request, f"0 to {len(requests) - 1}, an index into requests")
            if chunk.request in seen:
                raise UserError(f"{where}.request", chunk.request, "at most one chunk of each request in a round")
            seen.add(chunk.request)
            if chunk.tokens < 1:
                raise UserError(f"{where}.tokens", chunk.tokens, "at least 1")
            if chunk.start != done[chunk.request]:
                allowed = f"{done[chunk.request]}, the next token of request {chunk.request} that has not run"
                raise UserError(f"{where}.start", chunk.start, allowed)
            left = requests[chunk.request].prompt_tokens - chunk.start
            if chunk.tokens > left:
                raise UserError(f"{where}.tokens", chunk.tokens, f"1 to {left}, what request {chunk.request} has left")
            done[chunk.request] = chunk.end
    for index, (request, end) in enumerate(zip(requests, done, strict=True)):
        if end != request.prompt_tokens:
            allowed = f"all tokens up to {request.prompt_tokens} must run (the rounds stop at {end})"
            raise UserError(f"requests[{index}].prompt_tokens", request.prompt_tokens, allowed)


def _without_sequence(content: dict[str, Any]) -> dict[str, Any]:
    """A file of schema 1 as one of schema 2: it named a mode of sequence parallelism that was never run."""
    parallel = content.get("parallel")
    if not isinstance(parallel, dict):
        return content
    mode = parallel.get("sp_mode", "none")
    if mode != "none":
        raise UserError("parallel.sp_mode", mode, f"must be none in a file of {SCHEMA_1}; {SCHEMA} has sp_kind")
    names = ("tp_size", "pp_size", "sp_size", "layer_partition")
    known = {name: value for name, value in parallel.items() if name in names}
    return {name: value for name, value in content.items() if name != "cuts"} | {"parallel": known}


def _request_to_json(request: Request) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": request.id,
        "prompt_tokens": request.prompt_tokens,
        "cached_tokens": request.cached_tokens,
        "arrival_s": request.arrival_s,
    }
    if request.weight != 1.0:
        out["weight"] = request.weight
    if request.output_tokens != 1:
        out["output_tokens"] = request.output_tokens
    for name in ("sla_ttft_s", "sla_tpot_s", "priority"):
        if getattr(request, name) is not None:
            out[name] = getattr(request, name)
    return out


def _with_id(index: int, entry: object) -> object:
    """A request as a hand-written file may give it: without an id it is named by its place, a number is a name too."""
    if not isinstance(entry, dict):
        return entry
    name = entry.get("id", f"r{index}")
    return entry | {"id": str(name) if isinstance(name, int) else name}
