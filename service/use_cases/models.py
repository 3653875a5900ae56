"""Models: those that a caller elsewhere may name, which architectures are run and how, and what one consists of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from db.errors import UserError
from profiler.library.verified import VERIFIED
from profiler.model import PRECISIONS, Backend, load_model_shape
from profiler.model.architectures.table import ARCHITECTURES
from profiler.model.bundled import bundled_names
from profiler.model.shape import Layer, ModelShape
from profiler.model.whole.blocks import PLANNED

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")


REFUSED = "refused"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Supported:
    """An architecture and what runs it."""

    architecture: str
    backend: str
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Layers of a model that are alike."""

    kind: str
    layers: int
    parameters: int
    """Of one layer."""
    active_parameters: int
    """Of these, in the matrices that one token goes through."""
    kv_bytes_a_token: int
    """Of one layer, in the model's dtype, as long as the context is within the window."""
    window_tokens: int | None
    state_bytes: int
    """Kept of a prompt, however long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """One model: what it consists of, what runs it, or why nothing does."""

    name: str
    backend: str
    reason: str | None = None
    """Why it is planned only, or refused."""
    architecture: str | None = None
    parameters: int | None = None
    """Of all that the configuration describes; layers that only guess further tokens (MTP) are left out."""
    text_parameters: int | None = None
    """Of its text decoder, which is what plans are about."""
    active_parameters: int | None = None
    """Of these, that one token goes through, embedding and head included."""
    layers: int | None = None
    kinds: tuple[LayerKind, ...] = ()
    kv_bytes_a_token: int | None = None
    """Of all layers whose keys and values grow with the context."""
    max_positions: int | None = None
    dtype: str | None = None
    format: str | None = None
    """Of the checkpoint's linears."""
    format_note: str | None = None
    """Why weights in that format are not read: plans are made as if they were converted."""


def supported() -> list[Supported]:
    """Every architecture with kernels here, those held equal through Transformers, and those that are planned only."""
    rows = [Supported(architecture=name, backend=Backend.OWN) for name in ARCHITECTURES]
    rows += [
        Supported(architecture=name, backend=Backend.TRANSFORMERS) for name in VERIFIED if name not in ARCHITECTURES
    ]
    rows += [
        Supported(architecture=name, backend=Backend.PLANNING, about="neither kernels here nor Transformers have it")
        for name in PLANNED
    ]
    other = "tokens not held equal by a test; refused by name where its cache or its rotation does not go in chunks"
    return [*rows, Supported(architecture="other decoders of Transformers", backend=Backend.TRANSFORMERS, about=other)]


def model_report(model: str) -> ModelReport:
    """What MODEL is. Raises `UserError` where there is no such configuration; one that is not supported says so."""
    try:
        shape = load_model_shape(model)
    except UserError as error:
        if error.field == "MODEL":
            raise
        return ModelReport(name=model, backend=REFUSED, reason=str(error))
    kinds = [_kind(layer, count, shape) for layer, count in Counter(shape.every_layer).items()]
    return ModelReport(
        name=shape.name,
        backend=shape.backend,
        reason=shape.unrun,
        architecture=shape.architecture,
        parameters=shape.num_parameters,
        text_parameters=shape.num_text_parameters,
        active_parameters=_active_parameters(shape),
        layers=shape.num_layers,
        kinds=tuple(kinds),
        kv_bytes_a_token=sum(one.layers * one.kv_bytes_a_token for one in kinds if one.window_tokens is None),
        max_positions=shape.max_positions,
        dtype=shape.dtype,
        format=shape.weight_format or shape.dtype,
        format_note=shape.unread,
    )


def _kind(layer: Layer, count: int, shape: ModelShape) -> LayerKind:
    num_bytes = PRECISIONS[shape.dtype].kv.num_bytes
    return LayerKind(
        kind=layer.kind,
        layers=count,
        parameters=layer.num_elements(),
        active_parameters=layer.product_elements(),
        kv_bytes_a_token=num_bytes(layer.kv_numbers),
        window_tokens=layer.window,
        state_bytes=num_bytes(layer.state_numbers),
    )


def _active_parameters(shape: ModelShape) -> int:
    return shape.num_text_parameters - sum(layer.idle_elements for layer in shape.every_layer)
