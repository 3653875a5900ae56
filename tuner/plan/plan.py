"""What a plan is: requests, chunks, rounds, the parallel layout, and the isochunk.plan/1 file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db.errors import UserError
from db.files.documents import located, of_schema, parse, read_json, write_json
from tuner.plan.cost_model import MAX_SECONDS, MAX_TOKENS

SCHEMA = "isochunk.plan/1"
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
                raise UserError(name, getattr(self, name), "at least 1")
        if len(self.layer_partition) != self.pp_size:
            allowed = f"one number of layers a stage (pp_size is {self.pp_size})"
            raise UserError("layer_partition", list(self.layer_partition), allowed)
        if any(layers < 1 for layers in self.layer_partition):
            raise UserError("layer_partition", list(self.layer_partition), "at least one layer a stage")

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

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.threads_per_rank is not None and not 1 <= self.threads_per_rank <= MAX_THREADS:
            raise UserError("threads_per_rank", self.threads_per_rank, f"at least 1, at most {MAX_THREADS}")
        check_rounds(self.requests, self.rounds)
        told = len(self.predicted.ttft_s) if self.predicted else 0
        if told not in (0, len(self.requests)):
            allowed = f"one for each of {len(self.requests)} requests, or none"
            raise UserError("predicted.ttft_s", f"{told} values", allowed)

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
        return out

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Read the content of an isochunk.plan/1 file; unknown fields are ignored. Raises UserError."""
        content = of_schema(data, SCHEMA)
        requests = content.get("requests")
        if isinstance(requests, list):
            content = content | {"requests": [_with_id(index, entry) for index, entry in enumerate(requests)]}
        return parse(cls, content)


def load_plan(path: str | Path) -> Plan:
    """Read and check an isochunk.plan/1 file. Raises UserError naming the field, its value and what is allowed."""
    content = read_json(path, field="plan")
    with located(path):
        return Plan.from_json(content)


def save_plan(path: str | Path, plan: Plan) -> None:
    """Write an isochunk.plan/1 file, atomically."""
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


def _with_id(index: int, entry: object) -> object:
    """A request as a hand-written file may give it: without an id it is named by its place, a number is a name too."""
    if not isinstance(entry, dict):
        return entry
    name = entry.get("id", f"r{index}")
    return entry | {"id": str(name) if isinstance(name, int) else name}
