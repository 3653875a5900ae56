"""Times one function on one device: repeated samples in, robust statistics out."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from profiler.kernels.recording import new_scratch, record
from profiler.measure.background_load import LOAD_S, SETTLE_S, BackgroundLoad, keep_busy

Run = Callable[[int], object]  # given how often it was called before, so that it can take turns over cold weights

NOISY_SPREAD = 0.2
MIN_SAMPLES, MAX_SAMPLES = 3, 20
MIN_SAMPLE_S = {"cpu": 2e-3, "cuda": 2e-4}  # a shorter sample would time the clock and the barrier's skew
_WAITING_FACTOR = 4  # messages vary one by one with what the scheduler wakes first; their mean is what a run sees
# A sample during which its thread had the core for less than this share was not alone on it.
_UNDISTURBED_SHARE = 0.95
# A card's clocks fall under load within some tens of milliseconds: what counts is its rate in the middle of a run.
SUSTAINED_S = {"cpu": 0.0, "cuda": 0.06}
LONG_SAMPLE_S = 5e-3  # brings a card to its own power; shorter ones are taken at that of the load between them
OWN_LOAD_S = 0.6  # of samples under the work's own load: clocks swing by two percent within tenths of a second
RECORDED_CALL_S = 2e-3  # shorter calls on a card are replayed: launched one by one they would time the host
RECORDED_LAYER_S = 2e-2  # the same of whole layers, of many launches


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Work ready to be timed: a call of `run` does `num_units` of what is measured; `finish` ends what was begun."""

    run: Run
    num_units: int = 1
    finish: Callable[[], None] | None = None
    waits: bool = False  # for other ranks: time off the processor is part of the work then
    recordable: bool = True
    follows_clock: bool = False  # bound by arithmetic: its time on a card goes with the inverse of the clock
    in_step: bool = False  # ranks leave it together: the time of the last to come is that of the work
    own_load: bool = False  # the mix that a run consists of: timed alone, once a card's clocks have settled under it


@dataclass(frozen=True, slots=True)
class Samples:
    """Microseconds a call, one figure a sample, and which samples met a core that was shared or slower than usual.

    A sample whose only thread had to share its core counts the time that the thread ran.
    """

    us: list[float]
    disturbed: list[bool]

    def __add__(self, other: Samples) -> Samples:
        return Samples(self.us + other.us, self.disturbed + other.disturbed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Statistics of a point's samples; percentiles interpolate linearly between samples.

    disturbed: whether too few undisturbed samples remained, so that disturbed ones count too.
    """

    num_samples: int
    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    std_us: float
    disturbed: bool

    @property
    def spread(self) -> float:
        """How far apart the tenth and the ninetieth percentile lie, as a share of the median."""
        return (self.p90_us - self.p10_us) / self.median_us if self.median_us > 0 else 0.0

    @property
    def noisy(self) -> bool:
        """Whether the samples disagree too much to be relied on, or the machine was busy with something else."""
        return self.spread > NOISY_SPREAD or self.disturbed


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a point is sampled: `num_samples` times, each the mean of `inner_repeats` calls."""

    warmup_calls: int
    num_samples: int
    inner_repeats: int
    sample_s: float = 0.0
    recorded: bool = False
    """Whether the calls of a sample are one recording."""
    settle_s: float = 0.0
    """How long the work itself runs before it is sampled; otherwise a card's usual load runs between the samples."""

    @property
    def num_calls(self) -> int:
        """Calls in all."""
        return self.warmup_calls + self.num_samples * self.inner_repeats


def summarize(all_samples: Samples) -> Timing:
    """Statistics of at least one sample."""
    samples, disturbed = np.asarray(all_samples.us, dtype=np.float64), np.asarray(all_samples.disturbed, dtype=bool)
    enough = np.count_nonzero(~disturbed) >= min(MIN_SAMPLES, samples.size)
    if enough:
        samples = samples[~disturbed]
    p10, median, p90 = np.percentile(samples, (10, 50, 90))
    return Timing(
        num_samples=samples.size,
        median_us=float(median),
        p10_us=float(p10),
        p90_us=float(p90),
        min_us=float(samples.min()),
        std_us=float(samples.std()),
        disturbed=not enough,
    )


def plan_sampling(
    call_s: float, *, device_type: str, budget_s: float, waits: bool = False, in_step: bool = False
) -> Sampling:
    """Sample a call of about `call_s` seconds: a cheap one up to MAX_SAMPLES times, a dear one MIN_SAMPLES times.

    budget_s: for all samples; calls so dear that three need twice as long are sampled as often as that allows.
    waits, in_step: as in `Prepared`.
    """
    call_s = max(call_s, 1e-7)
    min_sample_s = (_WAITING_FACTOR if waits else 1) * MIN_SAMPLE_S[device_type]
    inner_repeats = 1 if in_step else max(1, math.ceil(min_sample_s / call_s))
    sample_s = inner_repeats * call_s
    num_samples = max(MIN_SAMPLES, min(MAX_SAMPLES, int(budget_s / sample_s)))
    if num_samples * sample_s > 2 * budget_s:
        num_samples = max(1, int(2 * budget_s / sample_s))
    warmup_calls = math.ceil(SUSTAINED_S[device_type] / call_s) if sample_s >= LONG_SAMPLE_S else inner_repeats
    return Sampling(
        warmup_calls=warmup_calls,
        num_samples=num_samples,
        inner_repeats=inner_repeats,
        sample_s=sample_s,
        recorded=device_type == "cuda" and call_s < RECORDED_CALL_S,
    )


def plan_own_load(call_s: float) -> Sampling:
    """Sample a call on a card under its own load for OWN_LOAD_S, or three times, or once if that takes so long."""
    call_s = max(call_s, 1e-7)
    inner_repeats = max(1, math.ceil(OWN_LOAD_S / MAX_SAMPLES / call_s))
    sample_s = inner_repeats * call_s
    return Sampling(
        warmup_calls=1,
        num_samples=1 if call_s > OWN_LOAD_S else max(MIN_SAMPLES, min(MAX_SAMPLES, int(OWN_LOAD_S / sample_s))),
        inner_repeats=inner_repeats,
        sample_s=sample_s,
        recorded=call_s < RECORDED_LAYER_S,
        settle_s=SETTLE_S,
    )


def take_samples(
    prepared: Prepared,
    sampling: Sampling,
    device: torch.device,
    *,
    is_slow: Callable[[], bool] | None = None,
    load: BackgroundLoad | None = None,
) -> Samples:
    """Time the work; `run` is called with the number of the call, from 0 on.

    is_slow: asked between the samples on a CPU, says whether the core is slower than usual.
    load: a card's usual work, run around each sample so that clocks and cache are as they are in the middle of a run.

    On CUDA events are recorded around samples and read at the end, so that the card never waits for the host's clock.
    """
    for call in range(sampling.warmup_calls):
        prepared.run(call)
    collecting = gc.isenabled()
    gc.disable()
    try:
        if device.type == "cuda":
            us = _sample_cuda(prepared, sampling, device, None if prepared.waits and not prepared.in_step else load)
            return Samples([each / prepared.num_units for each in us], [False] * len(us))
        # With several threads the first may well wait for the others.
        may_wait = prepared.waits or torch.get_num_threads() > 1
        samples = _sample_cpu(prepared.run, sampling, may_wait=may_wait, is_slow=is_slow or (lambda: False))
        return Samples([each / prepared.num_units for each in samples.us], samples.disturbed)
    finally:
        if prepared.finish is not None:
            prepared.finish()
        if collecting:
            gc.enable()


def call_seconds(run: Run, device: torch.device) -> float:
    """Seconds of one call and of what it left on the device's queue: a first idea, and a warm-up."""
    start = time.perf_counter()
    run(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _sample_cpu(run: Run, sampling: Sampling, *, may_wait: bool, is_slow: Callable[[], bool]) -> Samples:
    us, disturbed, call = [], [], sampling.warmup_calls
    slow = is_slow()
    for _ in range(sampling.num_samples):
        ran_start, start = time.thread_time(), time.perf_counter()
        for repeat in range(sampling.inner_repeats):
            run(call + repeat)
        elapsed_s, ran_s = time.perf_counter() - start, time.thread_time() - ran_start
        shared = not may_wait and ran_s < _UNDISTURBED_SHARE * elapsed_s
        us.append((ran_s if shared else elapsed_s) / sampling.inner_repeats * 1e6)
        was_slow, slow = slow, is_slow()
        disturbed.append(shared or slow or was_slow)
        call += sampling.inner_repeats
    return Samples(us, disturbed)


def _sample_cuda(
    prepared: Prepared, sampling: Sampling, device: torch.device, load: BackgroundLoad | None
) -> list[float]:
    def sample() -> None:
        for call in range(sampling.inner_repeats):  # from 0 on: a recording must not read what an earlier call left
            prepared.run(call)

    run = record(sample, device, new_scratch(device)) if sampling.recorded and prepared.recordable else sample
    if sampling.settle_s:
        keep_busy(run, sampling.settle_s, device)
        ends = [_event() for _ in range(sampling.num_samples + 1)]
        for end in ends[:-1]:
            end.record()
            run()
        ends[-1].record()
        torch.cuda.synchronize(device)
        return [before.elapsed_time(after) / sampling.inner_repeats * 1e3 for before, after in pairwise(ends)]
    if load is not None and sampling.sample_s < LONG_SAMPLE_S:
        for _ in range(math.ceil(SUSTAINED_S["cuda"] / LOAD_S)):
            load.run()
    run()
    events = [tuple(_event() for _ in range(3)) for _ in range(sampling.num_samples)]
    for before, start, finish in events:
        before.record()
        if load is not None:
            load.run()
        start.record()
        run()
        finish.record()
    torch.cuda.synchronize(device)
    factor = 1.0
    if load is not None and prepared.follows_clock:
        factor = load.clock_factor([before.elapsed_time(start) * 1e3 for before, start, _ in events])
    return [factor * start.elapsed_time(finish) / sampling.inner_repeats * 1e3 for _, start, finish in events]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
