"""What a job is: a command with its options, where it may run, and how far it came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class JobKind(StrEnum):
    """The command that a job runs."""

    PROFILE = "profile"
    TUNE = "tune"
    RUN_PLAN = "run-plan"
    QUANTIZE = "quantize"


class JobStatus(StrEnum):
    """How far a job came."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes of it."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is to be run. Names of models are looked up by the worker, in folders of its machine's own."""

    kind: JobKind
    flags: tuple[str, ...] = ()
    """Options as on the command line, each in one word."""
    model: str | None = None
    plan_id: int | None = None
    weights: str | None = None
    """The model whose weights a plan runs with."""
    output: str | None = None
    """The name of the model that a quantization writes, beside the one that it reads."""
    texts: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What files hold that the command reads, by the names of its options."""
    retry_of: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is queued."""
        return {
            "kind": self.kind.value,
            "flags": list(self.flags),
            "model": self.model,
            "plan_id": self.plan_id,
            "weights": self.weights,
            "output": self.output,
            "texts": dict(self.texts),
            "retry_of": self.retry_of,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> JobSpec:
        """As it was queued."""
        return cls(**{**content, "kind": JobKind(content["kind"]), "flags": tuple(content["flags"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job and how far it came."""

    id: str
    spec: JobSpec
    hardware: str
    """The key of the hardware that it waits for or runs on."""
    status: JobStatus
    worker: str | None
    """The machine that took it last."""
    attempts: int
    """How often a worker took it up."""
    created_at: datetime
    updated_at: datetime
    error: str | None
    result: Any = None
