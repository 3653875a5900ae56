"""Models by name: shapes that come with isochunk (sizes only, no weights), and folders with a `config.json`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from db.errors import UserError
from db.files.documents import located, parse, read_json
from db.files.json_text import parse_json
from profiler.model.configuration import model_from_config
from profiler.model.quantization import FIELD, with_sidecar
from profiler.model.shape import ModelShape

SIDECAR = "hf_quant_config.json"  # where ModelOpt says how a checkpoint is quantized
_SHAPES = files("profiler.model").joinpath("shapes")


def bundled_names() -> list[str]:
    """Names of the shapes that come with isochunk."""
    return sorted(path.name.removesuffix(".json") for path in _SHAPES.iterdir())


def load_model_shape(model: str, *, backend: str = "auto", device_type: str = "cpu") -> ModelShape:
    """Read the shape of MODEL: a folder with a `config.json`, the name of a bundled shape, or a Hugging Face id that
    is in the local cache. See `model_from_config` for the others."""
    if model in bundled_names():
        data = _SHAPES.joinpath(f"{model}.json").read_bytes()
        return model_from_config(parse_json(data, "MODEL", model), name=model, backend=backend, device_type=device_type)
    folder = _cached(model) or Path(model)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            "MODEL",
            model,
            "must be a folder with a config.json, an id of the Hugging Face cache, or one of "
            + ", ".join(bundled_names()),
        )
    content = read_json(path, field="MODEL")
    with located(path):
        config = parse(dict[str, Any], content)
    if not config.get(FIELD) and (folder / SIDECAR).is_file():
        sidecar = read_json(folder / SIDECAR, field="MODEL")
        with located(folder / SIDECAR):
            config = with_sidecar(config, parse(dict[str, Any], sidecar))
    with located(path):
        return model_from_config(config, name=Path(model).resolve().name, backend=backend, device_type=device_type)


def _cached(model: str) -> Path | None:
    """The folder of a snapshot in the Hugging Face cache, without any call to the network."""
    if model.count("/") != 1 or Path(model).exists():
        return None
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json")
    except (ImportError, ValueError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None
