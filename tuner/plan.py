"""What a plan is: requests, chunks, rounds, the parallel layout, and the isochunk.plan/1 file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from db.errors import UserError
from tuner.cost_model import MAX_SECONDS, MAX_TOKENS, read_json, write_json

SCHEMA = "isochunk.plan/1"


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
        if not (math.isfinite(self.weight) and self.weight >= 0.0):
            raise UserError("weight", self.weight, "a finite number, at least 0, is needed")
        if self.sla_ttft_s is not None and not 0.0 < self.sla_ttft_s <= MAX_SECONDS:
            allowed = f"a finite number of seconds above 0, at most {MAX_SECONDS:g}, is needed"
            raise UserError("sla_ttft_s", self.sla_ttft_s, allowed)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How the model is spread: `pp_size` stages of `layer_partition` layers, each held by tp_size x sp_size ranks."""

    tp_size: int
    pp_size: int
    layer_partition: tuple[int, ...]
    sp_size: int = 1
    sp_mode: str = "none"

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size", "sp_size"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name}", getattr(self, name), "at least 1")
        if len(self.layer_partition) != self.pp_size:
            allowed = f"one number of layers a stage (pp_size is {self.pp_size})"
            raise UserError("parallel.layer_partition", list(self.layer_partition), allowed)
        if any(layers < 1 for layers in self.layer_partition):
            raise UserError("parallel.layer_partition", list(self.layer_partition), "at least one layer a stage")

    def to_json(self) -> dict[str, Any]:
        """The `parallel` object of a plan file."""
        names = ("tp_size", "pp_size", "sp_size", "sp_mode")
        return {name: getattr(self, name) for name in names} | {"layer_partition": list(self.layer_partition)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the cost model expects of the plan."""

    makespan_s: float
    lower_bound_s: float | None = None
    gap: float | None = None
    ttft_s: tuple[float, ...] = ()
    planning_s: float | None = None
    round_s: tuple[tuple[float, ...], ...] | None = None
    """[round][stage] seconds of each round on each stage."""
    uncertainty: float | None = None
    """Relative error to expect of makespan_s, from the fit's residuals."""

    def to_json(self) -> dict[str, Any]:
        """The `predicted` object of a plan file; what is not known is left out."""
        out = {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) is not None}
        out["ttft_s"] = list(self.ttft_s)
        if self.round_s is not None:
            out["round_s"] = [list(row) for row in self.round_s]
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
    cost_model: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further top-level fields for the file; readers ignore what they do not know."""

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.threads_per_rank is not None and self.threads_per_rank < 1:
            raise UserError("threads_per_rank", self.threads_per_rank, "at least 1")
        check_rounds(self.requests, self.rounds)

    def to_json(self) -> dict[str, Any]:
        """The content of an isochunk.plan/1 file."""
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
        if self.cost_model is not None:
            out["cost_model"] = dict(self.cost_model)
        return out | {name: value for name, value in self.extra.items() if name not in out}

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Read the content of an isochunk.plan/1 file; unknown fields are ignored. Raises UserError."""
        plan = _object("plan", data)
        if plan.get("schema") != SCHEMA:
            raise UserError("schema", plan.get("schema", "missing"), f"{SCHEMA} is the version read here")
        requests = _list("requests", plan.get("requests"))
        rounds = _list("rounds", plan.get("rounds"))
        names = ("predicted", "policy", "cost_model", "threads_per_rank")
        predicted, policy, cost_model, threads = (plan.get(name) for name in names)
        return cls(
            model=_object("model", plan.get("model")),
            precision=_text("precision", plan.get("precision")),
            parallel=_parallel_from_json(_object("parallel", plan.get("parallel"))),
            requests=tuple(_request_from_json(i, entry) for i, entry in enumerate(requests)),
            rounds=tuple(_round_from_json(f"rounds[{i}]", entry) for i, entry in enumerate(rounds)),
            window=None if plan.get("window") is None else _integer("window", plan["window"]),
            threads_per_rank=None if threads is None else _integer("threads_per_rank", threads),
            predicted=None
            if predicted is None
            else _predicted_from_json(_object("predicted", predicted), len(requests)),
            policy=None if policy is None else _text("policy", policy),
            cost_model=None if cost_model is None else _object("cost_model", cost_model),
        )


def load_plan(path: str | Path) -> Plan:
    """Read and check an isochunk.plan/1 file. Raises UserError naming the field, its value and what is allowed."""
    return Plan.from_json(read_json(path))


def save_plan(path: str | Path, plan: Plan) -> None:
    """Write an isochunk.plan/1 file, atomically."""
    write_json(path, plan.to_json())


def check_window(window: int | None) -> None:
    """Raise UserError unless `window` is None (unlimited) or at least 1."""
    if window is not None and window < 1:
        raise UserError("window", window, "at least 1 round, or null for no limit")


def check_rounds(requests: Sequence[Request], rounds: Sequence[Round]) -> None:
    """Raise UserError unless the rounds run every new token of every request exactly once and in order."""
    if not requests:
        raise UserError("requests", "[]", "at least one request is needed")
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


def _request_to_json(request: Request) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": request.id,
        "prompt_tokens": request.prompt_tokens,
        "cached_tokens": request.cached_tokens,
        "arrival_s": request.arrival_s,
    }
    if request.weight != 1.0:
        out["weight"] = request.weight
    if request.sla_ttft_s is not None:
        out["sla_ttft_s"] = request.sla_ttft_s
    return out


def _request_from_json(index: int, data: object) -> Request:
    where = f"requests[{index}]"
    entry = _object(where, data)
    try:
        return Request(
            id=str(entry.get("id", f"r{index}")),
            prompt_tokens=_integer("prompt_tokens", entry.get("prompt_tokens")),
            cached_tokens=_integer("cached_tokens", entry.get("cached_tokens", 0)),
            arrival_s=_float("arrival_s", entry.get("arrival_s", 0.0)),
            weight=_float("weight", entry.get("weight", 1.0)),
            sla_ttft_s=None if entry.get("sla_ttft_s") is None else _float("sla_ttft_s", entry["sla_ttft_s"]),
        )
    except UserError as error:
        raise UserError(f"{where}.{error.field}", error.value, error.allowed) from None


def _round_from_json(where: str, data: object) -> Round:
    return tuple(_chunk_from_json(f"{where}[{i}]", entry) for i, entry in enumerate(_list(where, data)))


def _chunk_from_json(where: str, data: object) -> Chunk:
    entry = _object(where, data)
    return Chunk(*(_integer(f"{where}.{name}", entry.get(name)) for name in ("request", "start", "tokens")))


def _parallel_from_json(entry: Mapping[str, Any]) -> Parallel:
    sizes = {name: _integer(f"parallel.{name}", entry.get(name, 1)) for name in ("tp_size", "pp_size", "sp_size")}
    layers = _list("parallel.layer_partition", entry.get("layer_partition"))
    return Parallel(
        layer_partition=tuple(_integer(f"parallel.layer_partition[{i}]", n) for i, n in enumerate(layers)),
        sp_mode=_text("parallel.sp_mode", entry.get("sp_mode", "none")),
        **sizes,
    )


def _predicted_from_json(entry: Mapping[str, Any], num_requests: int) -> Predicted:
    optional = ("lower_bound_s", "gap", "planning_s", "uncertainty")
    numbers = {name: _float(f"predicted.{name}", entry[name]) for name in optional if entry.get(name) is not None}
    makespan_s = _float("predicted.makespan_s", entry.get("makespan_s"))
    if makespan_s <= 0.0:
        raise UserError("predicted.makespan_s", makespan_s, "seconds above 0 are needed")
    ttft_s = _floats("predicted.ttft_s", entry.get("ttft_s", []))
    if ttft_s and len(ttft_s) != num_requests:
        raise UserError(
            "predicted.ttft_s", f"{len(ttft_s)} values", f"one for each of {num_requests} requests, or none"
        )
    rows = entry.get("round_s")
    return Predicted(
        makespan_s=makespan_s,
        ttft_s=ttft_s,
        round_s=None
        if rows is None
        else tuple(_floats(f"predicted.round_s[{i}]", row) for i, row in enumerate(_list("predicted.round_s", rows))),
        **numbers,
    )


def _object(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(name, "missing" if value is None else value, "an object is needed")
    return value


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(name, "missing" if value is None else value, "a list is needed")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(name, "missing" if value is None else value, "a string is needed")
    return value


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(name, "missing" if value is None else value, "a whole number is needed")
    return value


def _float(name: str, value: object) -> float:
    number = finite(value)
    if number is None:
        raise UserError(name, "missing" if value is None else value, "a finite number is needed")
    return number


def finite(value: object) -> float | None:
    """The float of a number read from JSON; None for anything else, and for numbers that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _floats(name: str, value: object) -> tuple[float, ...]:
    return tuple(_float(f"{name}[{i}]", item) for i, item in enumerate(_list(name, value)))
