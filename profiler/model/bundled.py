"""Models by name: shapes that come with isochunk (sizes only, no weights), and folders with a `config.json`."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from db.errors import UserError
from profiler.model.configuration import model_from_config
from profiler.model.shape import ModelShape

_SHAPES = files("profiler.model").joinpath("shapes")


def bundled_names() -> list[str]:
    """Names of the shapes that come with isochunk."""
    return sorted(path.name.removesuffix(".json") for path in _SHAPES.iterdir())


def load_model_shape(model: str) -> ModelShape:
    """Read the shape of MODEL: a folder with a `config.json`, or the name of a bundled shape."""
    if model in bundled_names():
        return model_from_config(json.loads(_SHAPES.joinpath(f"{model}.json").read_text()), name=model)
    folder = Path(model)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError("MODEL", model, "must be a folder with a config.json, or one of " + ", ".join(bundled_names()))
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError("MODEL", path, f"must be a readable JSON file ({error})") from error
    except RecursionError as error:
        raise UserError("MODEL", path, "must be a readable JSON file (it is nested too deeply)") from error
    if not isinstance(config, dict):
        raise UserError("MODEL", path, "must hold a JSON object")
    return model_from_config(config, name=folder.resolve().name)
