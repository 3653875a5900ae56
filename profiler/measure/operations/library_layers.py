"""Layers that Transformers runs, as points: of each kind the first one of the model, with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from profiler.library.found import find
from profiler.measure.operations.workspace import Workspace
from profiler.measure.timing import Run
from profiler.model import ModelShape, WholeLayer
from profiler.points.point import BEFORE_LAYERS, Point
from profiler.points.whole_layers import whole_sizes, whole_variant

if TYPE_CHECKING:
    from profiler.library_layers.timed import TimedLayer


class LibraryLayers:
    """One layer at a time, because one layer may take half a card's memory."""

    def __init__(self, shape: ModelShape, context_length: int, workspace: Workspace) -> None:
        self.shape, self.context_length, self.workspace = shape, context_length, workspace

    def run(self, point: Point) -> Run:
        """The work of a `layer` point."""
        chunk, context = point.shape["chunk"], point.shape["context"]
        timed = self._timed(self._index_of(point))
        return timed.before(chunk, context) if point.variant == BEFORE_LAYERS else timed.run(chunk, context)

    def is_recordable(self, point: Point) -> bool:
        """Whether a run records the work of a `layer` point."""
        return self._timed(self._index_of(point)).is_recordable

    def _timed(self, index: int) -> TimedLayer:
        layer, precision = self.shape.every_layer[index], self.workspace.precision
        size = layer.weights_bytes(precision)
        from profiler.library_layers.timed import TimedLayer  # imports Transformers, which takes seconds

        return self.workspace.keep(
            ("library layer", index),
            size,
            lambda: TimedLayer(
                find(self.shape.config),
                index,
                rows=self.context_length,
                device=self.workspace.device,
                dtype=precision.activations.torch_dtype,
            ),
        )

    def _index_of(self, point: Point) -> int:
        if point.variant == BEFORE_LAYERS:
            return 0
        for index, layer in enumerate(self.shape.every_layer):
            assert isinstance(layer, WholeLayer)
            if whole_variant(layer) == point.variant and whole_sizes(layer).items() <= point.shape.items():
                return index
        raise ValueError(f"{self.shape.name} has no layer of {point.shape} {point.variant}")
