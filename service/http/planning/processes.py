"""Planning in processes beside the service's own: each request has its time and memory, and cannot take more."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from db.errors import UserError
from service.http.planning.request import MadePlan, PlanRequest
from service.http.problems import RefusedError

_PLANS_A_PROCESS = 500
_NICE = 10
_LOOK_EVERY_S = 0.5
"""How often it is seen whether the caller of a plan that waits is still there."""
_OUT_OF_MEMORY = 9
"""What a process that ran out of memory exits with."""
_NEAR_LIMIT_BYTES = 64 << 20
"""A process this near to its limit that fails has run out of memory: where an allocation fails decides which error
comes of it, and CPython, NumPy and SciPy do not always say MemoryError (SystemError, ImportError, OSError)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningLimits:
    """What making one plan may take, and how many may be asked for at once."""

    processes: int = 2
    cpu_s: float = 20.0
    wall_s: float = 240.0
    """A backstop: planning has a low priority, and on a machine that others keep busy it waits for the processor."""
    memory_bytes: int = 6 << 30
    waiting: int = 64


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A UserError on its way between processes: exceptions of several arguments do not travel."""

    field: str
    value: str
    allowed: str


class Planning:
    """Processes that make plans, kept warm; one that takes too long, or too much, is ended and replaced."""

    def __init__(self, limits: PlanningLimits) -> None:
        self.limits, self.num_asked = limits, 0
        """Plans that are being made or wait are `num_asked`."""
        self._free = asyncio.Semaphore(limits.processes)
        """Who waits for a process waits here: a task in the pool's own queue cannot be taken back."""
        self._pool = ProcessPool(
            max_workers=limits.processes,
            max_tasks=_PLANS_A_PROCESS,
            initializer=_begin,
            initargs=(os.getpid(), limits.memory_bytes),
            context=multiprocessing.get_context("spawn"),
        )

    def warm_up(self) -> None:
        """Start the processes, so that the first plan does not wait for imports."""
        for _ in range(self.limits.processes):
            self._pool.schedule(_warm)

    async def make(self, request: PlanRequest, is_gone: Callable[[], Awaitable[bool]] | None = None) -> MadePlan:
        """A plan. Raises UserError for what is refused, RefusedError for what takes too much.

        is_gone: whether the caller has gone; a plan that nobody waits for is not begun.
        """
        if self.num_asked >= self.limits.waiting:
            raise _full(self.num_asked, f"at most {self.limits.waiting} at once")
        self.num_asked += 1
        try:
            await self._turn(is_gone)
            try:
                given = [request, self.limits.cpu_s]
                future: Future[Any] = self._pool.schedule(_make, args=given, timeout=self.limits.wall_s)
                made = await asyncio.wrap_future(future)
            finally:
                self._free.release()
        except TimeoutError:
            raise _full("too busy", f"the machine to have a processor within {self.limits.wall_s:g} s") from None
        except ProcessExpired:
            allowed = f"must be planned within {self.limits.memory_bytes >> 20} MiB of memory"
            raise RefusedError(422, "plan", "too much work", allowed) from None
        finally:
            self.num_asked -= 1
        if made is None:
            allowed = f"must be planned within {self.limits.cpu_s:g} s: fewer or shorter prompts, a fixed layout"
            raise RefusedError(422, "plan", "too much work", allowed)
        if isinstance(made, _Refusal):
            raise UserError(made.field, made.value, made.allowed)
        assert isinstance(made, MadePlan)
        return made

    async def _turn(self, is_gone: Callable[[], Awaitable[bool]] | None) -> None:
        """Wait until a process is free, first come, first served."""
        turn = asyncio.ensure_future(self._free.acquire())
        try:
            while not (await asyncio.wait([turn], timeout=_LOOK_EVERY_S))[0]:
                if is_gone is not None and await is_gone():
                    raise _full("nobody waits", "a caller who waits")
        except BaseException:
            if not turn.cancel():
                self._free.release()
            raise

    def close(self) -> None:
        """End the processes."""
        self._pool.stop()  # type: ignore[no-untyped-call]  # the package leaves it so
        with contextlib.suppress(TimeoutError):
            self._pool.join(timeout=5)


def _full(value: object, allowed: str) -> RefusedError:
    return RefusedError(503, "plans", value, allowed, headers={"retry-after": "1"})


def _begin(service_pid: int, memory_bytes: int) -> None:
    from profiler.comm.ranks.child import die_with

    die_with(service_pid)
    os.nice(_NICE)  # who reads must not wait for who plans
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _warm() -> None:

    import service.use_cases.tune_model  # noqa: F401 - brings the fit and the database along


def _make(request: PlanRequest, cpu_s: float) -> MadePlan | _Refusal | None:
    """A plan, why it is refused, or None when it takes more of a processor than it may.

    A process that runs out of memory ends, and the pool starts another.
    """
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        from service.http.planning.request import make_plan

        return make_plan(request)
    except UserError as error:
        return _Refusal(error.field, str(error.value), error.allowed)
    except TimeoutError:
        return None
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except Exception:
        if _left_bytes() < _NEAR_LIMIT_BYTES:
            os._exit(_OUT_OF_MEMORY)
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _left_bytes() -> float:
    """How far below its limit on memory this process has stayed at its largest."""
    limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit_bytes == resource.RLIM_INFINITY:
        return float("inf")
    with Path("/proc/self/status").open() as status:
        peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmPeak:"))
    return limit_bytes - (peak_kib << 10)


def _too_long(_number: int, _frame: object) -> None:
    raise TimeoutError
