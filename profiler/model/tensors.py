"""Tensors of a layer: how each lies in a checkpoint, and which part of it a rank of a tensor-parallel group holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Cut(StrEnum):
    """What of a matrix [n, k] the ranks of a tensor-parallel group share out."""

    COLUMN = "column"  # its n outputs: each rank computes some of them
    ROW = "row"  # its k inputs: each rank computes a part of every output's sum
    REPLICATED = "replicated"  # nothing: each rank holds all


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension of `count` blocks of `width` features; a block (a head, or one feature) is never cut."""

    count: int
    width: int = 1

    @property
    def size(self) -> int:
        """All its features."""
        return self.count * self.width

    def per_rank(self, tp_size: int) -> int:
        """The most blocks that a rank holds: its share, or one that it has in common with others."""
        return -(-self.count // tp_size)

    def of_rank(self, tp_rank: int, tp_size: int) -> slice:
        """The features of one rank. Shares differ by one block at most; ranks share a block where there are too few."""
        first = self.count * tp_rank // tp_size
        end = max(first + 1, self.count * (tp_rank + 1) // tp_size)
        return slice(first * self.width, end * self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Folding:
    """What is done once to numbers of a checkpoint as they are read, so that kernels need not do it for every token.

    order: of the features within each block, by their places in the checkpoint. scale: a factor of all. offset: is
    added to all before.
    """

    order: tuple[int, ...] | None = None
    scale: float = 1.0
    offset: float = 0.0


AS_STORED = Folding()


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Outputs of a linear that lie together in a tensor of the checkpoint, from `first_row` on."""

    tensor: str  # without ".weight" or ".bias"
    rows: Dim
    first_row: int = 0
    folding: Folding = field(default=AS_STORED, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What a rank reads of one tensor of the checkpoint."""

    tensor: str
    rows: slice
    columns: slice
    folding: Folding = AS_STORED


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """A matrix [n, k] and its bias [n]: run as one product, kept in the checkpoint as one tensor or several."""

    name: str
    cut: Cut
    parts: tuple[TensorPart, ...]  # from the first output to the last
    inputs: Dim
    has_bias: bool = False
    kept: bool = field(default=False, repr=False)  # plain in every precision
    group_size: int | None = field(default=None, repr=False)  # inputs that share a scale in an 8-bit checkpoint

    def sizes(self, tp_size: int = 1) -> tuple[int, int]:
        """Out features n and in features k on a rank, the most that any holds."""
        n = sum(part.rows.per_rank(tp_size) * part.rows.width for part in self.parts)
        k = self.inputs.per_rank(tp_size) * self.inputs.width
        match self.cut:
            case Cut.COLUMN:
                return n, self.inputs.size
            case Cut.ROW:
                return self._num_rows, k
            case Cut.REPLICATED:
                return self._num_rows, self.inputs.size

    def num_elements(self, tp_size: int = 1) -> int:
        """Numbers that a rank holds, its bias included."""
        n, k = self.sizes(tp_size)
        return n * k + self.has_bias * n

    def slices(self, tp_rank: int, tp_size: int) -> Iterator[Slice]:
        """What a rank reads, part by part; of a bias it reads the same rows."""
        columns = self.inputs.of_rank(tp_rank, tp_size) if self.cut is Cut.ROW else slice(0, self.inputs.size)
        for part in self.parts:
            rows = part.rows.of_rank(tp_rank, tp_size) if self.cut is Cut.COLUMN else slice(0, part.rows.size)
            shifted = slice(part.first_row + rows.start, part.first_row + rows.stop)
            yield Slice(tensor=part.tensor, rows=shifted, columns=columns, folding=part.folding)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the checkpoint's tensors."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            rows = part.first_row + part.rows.size
            shapes[f"{part.tensor}.weight"] = (rows, self.inputs.size)
            if self.has_bias:
                shapes[f"{part.tensor}.bias"] = (rows,)
        return shapes

    def stored_in(self, tensor: str) -> LinearSpec:
        """The same linear, its parts one below the other in one tensor of the checkpoint."""
        parts, first_row = [], 0
        for part in self.parts:
            parts.append(replace(part, tensor=tensor, first_row=first_row))
            first_row += part.rows.size
        return replace(self, parts=tuple(parts))

    def folded(self, folding: Folding, *, parts: Collection[int] | None = None) -> LinearSpec:
        """The same with some of its parts, or all, folded so."""
        kept = range(len(self.parts)) if parts is None else parts
        made = tuple(replace(part, folding=folding) if index in kept else part for index, part in enumerate(self.parts))
        return replace(self, parts=made)

    @property
    def is_folded(self) -> bool:
        """Whether any of its numbers are not what the checkpoint holds."""
        return any(part.folding != AS_STORED for part in self.parts)

    @property
    def _num_rows(self) -> int:
        return sum(part.rows.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class NormSpec:
    """The weight of a root-mean-square norm over `dim`, or another vector of a layer; cut by column, it spans the ranks
    of the group."""

    tensor: str  # without the suffix
    dim: Dim
    cut: Cut = Cut.REPLICATED
    folding: Folding = field(default=AS_STORED, repr=False)
    suffix: str = field(default=".weight", repr=False)

    @property
    def name(self) -> str:
        """The checkpoint's tensor."""
        return f"{self.tensor}{self.suffix}"

    def num_elements(self, tp_size: int = 1) -> int:
        """Numbers that a rank holds."""
        return self.dim.per_rank(tp_size) * self.dim.width if self.cut is Cut.COLUMN else self.dim.size

    def rows(self, tp_rank: int, tp_size: int) -> slice:
        """What a rank reads of the tensor."""
        return self.dim.of_rank(tp_rank, tp_size) if self.cut is Cut.COLUMN else slice(0, self.dim.size)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the checkpoint's tensor."""
        return {self.name: (self.dim.size,)}
