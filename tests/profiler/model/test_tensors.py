"""How tensor-parallel ranks share out a layer's tensors: together they hold the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from profiler.model import load_model_shape
from profiler.model.shape import layer_prefix
from profiler.model.tensors import Cut, Dim
from tests.checkpoints import VARIANTS


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_shares_cover_a_vocabulary_that_tp_size_does_not_divide(tp_size: int) -> None:
    parts = [Dim(211).of_rank(rank, tp_size) for rank in range(tp_size)]
    assert [index for part in parts for index in range(211)[part]] == list(range(211))
    assert {part.stop - part.start for part in parts} <= {211 // tp_size, 211 // tp_size + 1}
    assert max(part.stop - part.start for part in parts) == Dim(211).per_rank(tp_size)


@pytest.mark.parametrize(
    ("num_heads", "tp_size", "heads"),
    [
        (4, 2, [(0, 1), (2, 3)]),
        (2, 2, [(0,), (1,)]),
        (2, 4, [(0,), (0,), (1,), (1,)]),
        (1, 4, [(0,), (0,), (0,), (0,)]),
    ],
)
def test_heads_are_shared_when_there_are_fewer_than_ranks(
    num_heads: int, tp_size: int, heads: list[tuple[int, ...]]
) -> None:
    for rank, expected in enumerate(heads):
        rows = Dim(num_heads, 24).of_rank(rank, tp_size)
        assert sorted({row // 24 for row in range(rows.start, rows.stop)}) == list(expected)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuts_of_every_linear_put_together_give_the_whole(
    variant: str, tp_size: int, checkpoint: Callable[[str], Path]
) -> None:
    """Sums of the ranks' products equal the product of the tensors of the file, for each output of each linear."""
    folder = checkpoint(variant)
    stored = {name: t.double() for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    shape = load_model_shape(str(folder))
    layer = shape.layers[2]
    for linear in layer.linears:
        x = torch.randn(3, linear.inputs.size, dtype=torch.float64)
        sums: dict[tuple[str, int], torch.Tensor] = {}
        for rank in range(tp_size):
            held = 0
            for part in linear.slices(rank, tp_size):
                weight = stored[f"{layer_prefix(2)}{part.tensor}.weight"][part.rows, part.columns]
                held += weight.shape[0]
                for row, y in enumerate((x[:, part.columns] @ weight.T).unbind(dim=1), part.rows.start):
                    before = sums.get((part.tensor, row), 0.0) if linear.cut is Cut.ROW else 0.0
                    sums[part.tensor, row] = before + y
            assert (held, part.columns.stop - part.columns.start) == linear.sizes(tp_size)
        for name, (num_rows, _) in ((n, s) for n, s in linear.tensors().items() if n.endswith("weight")):
            whole = x @ stored[f"{layer_prefix(2)}{name}"].T
            for row in range(num_rows):
                torch.testing.assert_close(sums.pop((name.removesuffix(".weight"), row)), whole[:, row])
        assert not sums
