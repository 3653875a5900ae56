"""Models that a caller elsewhere may name: bundled shapes, and those in folders that the operator allows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from db.errors import UserError
from profiler.model import load_model_shape
from profiler.model.bundled import bundled_names
from profiler.model.shape import ModelShape

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model by its name."""

    name: str
    bundled: bool
    """Comes with isochunk, without weights."""
    num_layers: int
    hidden_size: int
    max_positions: int
    dtype: str


def model_paths(folders: Sequence[Path]) -> dict[str, str]:
    """What `load_model_shape` is given for each name: the name of a bundled shape, or the path of a folder."""
    found = {name: name for name in bundled_names()}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if (path / "config.json").is_file():
                found.setdefault(path.name, str(path.resolve()))
    return found


def model_path(folders: Sequence[Path], name: str) -> str:
    """What a name stands for; a path is no name. Raises UserError for one that is not known."""
    known = model_paths(folders)
    if name not in known:
        raise UserError("model", name, f"must be one of {', '.join(sorted(known))}")
    return known[name]


def check_new_model(folders: Sequence[Path], name: str) -> None:
    """Raise UserError for a name that no model can be written under: one that is taken, or is more than a name."""
    if not _NAME.fullmatch(name):
        raise UserError("output", name, "must be letters, digits, dots, dashes and underscores, with a letter first")
    if name in model_paths(folders):
        raise UserError("output", name, "must be a name that no model has yet")


def new_model_path(folders: Sequence[Path], model: str, name: str) -> str:
    """Where a model made from another is written: beside it. Raises UserError where that is no folder of weights."""
    check_new_model(folders, name)
    source = Path(model_path(folders, model))
    if not source.is_absolute():
        raise UserError("model", model, "comes without weights: must be in a folder of --models")
    return str(source.parent / name)


def known_models(folders: Sequence[Path]) -> list[KnownModel]:
    """Every model that can be read, by name; folders with a configuration that is not supported are left out."""
    found = []
    for name, path in sorted(model_paths(folders).items()):
        try:
            found.append(_known(name, path, load_model_shape(path)))
        except UserError:
            continue
    return found


def _known(name: str, path: str, shape: ModelShape) -> KnownModel:
    return KnownModel(
        name=name,
        bundled=name == path,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        max_positions=shape.max_positions,
        dtype=shape.dtype,
    )
