"""Attention of one layer as a function of chunk and context, fitted with non-negative least absolute deviations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tuner.fit.curve import SPIKE, least_absolute

Floats = npt.NDArray[np.float64]
SHORTEST_S = 1e-12  # stands for zero where a logarithm is taken
# Query rows of a block on Hopper, as measured chunks show: of cuDNN's kernels, and of one that splits the context.
TILE_ROWS, SPLIT_ROWS = 128, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Waves:
    """Wave quantization: a kernel launches one block for each head and each TILE_ROWS rows, one a multiprocessor.

    After a long context all blocks take as long, and the last wave of them as long as a full one: 1280 rows of 32 heads
    are 320 blocks, three waves on 132 multiprocessors, as 1536 rows are. (NVIDIA, Matrix Multiplication Background
    User's Guide, "Wave Quantization" and "Tile Quantization".) A kernel that splits the context among blocks fills the
    card whatever the chunk; a last block of few rows takes as long as a full one there, too.
    """

    num_heads: int
    num_multiprocessors: int | None
    """None: the time is in proportion to the rows."""
    split_up_to: int = 0
    """Chunks up to it run in a kernel that splits the context."""

    def __call__(self, chunk: npt.ArrayLike) -> Floats:
        """Time relative to a card whose last wave is full; at least 1."""
        rows = np.maximum(np.asarray(chunk, dtype=np.float64), 1.0)
        if self.num_multiprocessors is None:
            return np.ones_like(rows)
        blocks = np.ceil(rows / TILE_ROWS) * self.num_heads
        full = rows / TILE_ROWS * self.num_heads / self.num_multiprocessors
        waste = np.ceil(blocks / self.num_multiprocessors) / full
        split: Floats = np.ceil(rows / SPLIT_ROWS) * SPLIT_ROWS / rows
        factor: Floats = np.where(self.splits(rows), split, waste)
        return factor

    def splits(self, chunk: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether chunks run in the kernel that splits the context."""
        return np.asarray(chunk, dtype=np.float64) <= self.split_up_to


IN_PROPORTION = Waves(num_heads=1, num_multiprocessors=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCurve:
    """t(c, p) = base(c) + slope(c) * p, the slope in waves.

    For a given chunk a kernel's time is linear in the context. Between the measured chunks, for the slope those of one
    kernel, both follow a power of the chunk (linear interpolation of logarithms): the square of large chunks and the
    constant of small ones are both such powers. Beyond the largest, base grows with the square and slope in proportion;
    below the smallest both stay.
    """

    chunks: Floats
    base_s: Floats
    context_s: Floats
    waves: Waves = IN_PROPORTION

    def base(self, chunk: npt.ArrayLike) -> Floats:
        """Seconds of chunks without context."""
        rows, largest = self._rows(chunk), float(self.chunks[-1])
        base_s = np.maximum(self.base_s, SHORTEST_S)
        seconds: Floats = _power(rows, self.chunks, base_s) * np.maximum(rows / largest, 1.0) ** 2
        return seconds

    def slope(self, chunk: npt.ArrayLike) -> Floats:
        """Seconds that each token of context adds."""
        rows, split = self._rows(chunk), self.waves.splits(self.chunks)
        row_s: Floats = np.where(self.waves.splits(rows), self._row_s(rows, split), self._row_s(rows, ~split))
        seconds: Floats = row_s * rows * self.waves(rows)
        return seconds

    def __call__(self, chunk: npt.ArrayLike, context: npt.ArrayLike) -> Floats:
        """Seconds of chunks after contexts."""
        return self.base(chunk) + self.slope(chunk) * np.asarray(context, dtype=np.float64)

    def _rows(self, chunk: npt.ArrayLike) -> Floats:
        rows: Floats = np.maximum(np.asarray(chunk, dtype=np.float64), self.chunks[0])
        return rows

    def _row_s(self, rows: Floats, of: npt.NDArray[np.bool_]) -> Floats:
        """What a context token adds for each row, by the chunks of one kernel if any were measured."""
        chunks, seconds = (self.chunks[of], self.context_s[of]) if of.any() else (self.chunks, self.context_s)
        return _power(rows, chunks, np.maximum(seconds, SHORTEST_S) / chunks)


def _power(at: Floats, knots: Floats, values: Floats) -> Floats:
    """Positive values between knots, linear in logarithms and constant outside."""
    value: Floats = np.exp(np.interp(np.log(at), np.log(knots), np.log(values)))
    return value


def fit_attention(
    chunk: Sequence[int],
    context: Sequence[int],
    seconds: Sequence[float],
    *,
    kernel_of: Callable[[int], str] = lambda _chunk: "",
    waves: Waves = IN_PROPORTION,
) -> AttentionCurve:
    """Fit measured points (chunk, context, seconds), minimising relative errors chunk by chunk.

    kernel_of: the kernel of a chunk after a long context. A chunk measured at one context alone takes its slope from
    its neighbours' cost of a (query, key) pair, of those with its kernel if there are any. A larger chunk could run as
    several smaller ones: where its pairs cost far more than theirs, the machine was disturbed.
    """
    kernels = tuple((each, kernel_of(each)) for each in dict.fromkeys(map(int, chunk)))
    return _fitted(tuple(chunk), tuple(context), tuple(seconds), kernels, waves)


@lru_cache(maxsize=1024)
def _fitted(
    chunk: tuple[int, ...],
    context: tuple[int, ...],
    seconds: tuple[float, ...],
    kernels: tuple[tuple[int, str], ...],
    waves: Waves,
) -> AttentionCurve:
    """Fit the curve; cached, because many layouts use the same points."""
    kernel_of = dict(kernels)
    c, p = np.asarray(chunk, dtype=np.float64), np.asarray(context, dtype=np.float64)
    measured = np.maximum(np.asarray(seconds, dtype=np.float64), SHORTEST_S)
    chunks = np.unique(c)
    lines = {
        at: np.array(_line(tuple(p[mine].tolist()), tuple(measured[mine].tolist())))
        for at in chunks
        for mine in [c == at]
        if (p[mine] != p[mine][0]).any()
    }
    for at, line in lines.items():
        line[1] /= waves(at)
    if lines:
        pair_s = np.array([_pair_seconds(at, lines, kernel_of) for at in chunks])
    else:
        pair_s = np.array([float(np.min(measured / (c * p + c * (c + 1.0) / 2.0)))] * len(chunks))
    slope = _undisturbed(pair_s) * chunks
    base = np.empty_like(slope)
    for index, at in enumerate(chunks):
        mine = c == at
        alone = float(np.min(measured[mine] - slope[index] * waves(at) * p[mine]))
        base[index] = lines[at][0] if at in lines else max(alone, 0.0)
    pairs = chunks * (chunks + 1.0) / 2.0
    return AttentionCurve(chunks=chunks, base_s=_undisturbed(base / pairs) * pairs, context_s=slope, waves=waves)


@lru_cache(maxsize=4096)
def _line(context: tuple[float, ...], seconds: tuple[float, ...]) -> tuple[float, float]:
    """(seconds at no context, seconds a context token) of one chunk; the same again whenever others are left out."""
    measured = np.array(seconds)
    design = np.stack([np.ones(len(measured)), np.array(context)], axis=1)
    base, slope = least_absolute(design / measured[:, None], np.ones(len(measured)))
    return float(base), float(slope)


def _pair_seconds(chunk: float, lines: Mapping[float, Floats], kernel_of: Mapping[int, str]) -> float:
    """Seconds that a context token adds for each token of a chunk: the chunk's own, or between its neighbours'."""
    known = [at for at in lines if kernel_of[int(at)] == kernel_of[int(chunk)]] or list(lines)
    per_pair = [lines[at][1] / at for at in known]
    return float(np.interp(np.log(chunk), np.log(known), per_pair))


def _undisturbed(pair_s: Floats) -> Floats:
    """Costs of a pair by chunk size, the far larger ones lowered to the least of a smaller chunk."""
    least_before = np.minimum.accumulate(np.concatenate([[np.inf], pair_s[:-1]]))
    return np.where(pair_s > SPIKE * least_before, least_before, pair_s)
