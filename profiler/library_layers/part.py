"""Consecutive layers of a model of Transformers on one device, with the ends of the model where they belong to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from db.errors import UserError
from profiler.kernels.recording import can_record
from profiler.library.found import Found
from profiler.library.skeleton import Skeleton, build
from profiler.library_layers.attention import use_kernels
from profiler.library_layers.cache import RequestCache

# Deviation of random embeddings. Next to the library's own, of 0.02, what attention adds is large and alike for all
# tokens: behind some layers all go to the same few experts. These stay apart, and routers spread them.
_APART = 8.0
_TRIED = 16  # tokens of a chunk that shows whether it can be recorded


class _LeaveError(Exception):
    """Ends a forward behind the last layer of the part, with the hidden states that it gave."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class _Passed(torch.nn.Module):
    """Stands where a layer of another part would: has its attributes, none of its weights, and changes nothing."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.gives_more = "tuple" in str(inspect.signature(layer.forward).return_annotation)
        self.stands_for = (layer,)  # in a tuple: a module's own modules count as its weights

    def __getattr__(self, name: str) -> Any:
        """What a model asks of its layers: their types, and parts of them."""
        return getattr(self.__dict__["stands_for"][0], name)

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """The same hidden states, and nothing beside them where the layer gives more."""
        return (hidden_states, None) if self.gives_more else hidden_states


class StagePart:
    """Runs chunks of one request at a time: hidden states in, hidden states out, its cache advanced.

    The library's own forward makes masks, positions and what else its layers are given. Layers before the part pass
    what they get; the part's first layer is handed the hidden states that came in, so that scaling of embeddings
    happens once, and the forward ends behind its last one.
    """

    def __init__(
        self, found: Found, layers: range, *, device: torch.device, dtype: torch.dtype, weights: Path | None = None
    ) -> None:
        """weights: a folder with safetensors; None for random ones."""
        self.found, self.layers, self.device, self.dtype = found, layers, device, dtype
        self.is_first, self.is_last = layers.start == 0, layers.stop == found.num_layers
        self.skeleton = build(found, dtype=dtype)
        use_kernels(self.skeleton.model)
        _strip(self.skeleton, layers, embeds=self.is_first, heads=self.is_last)
        self.entered: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None
        """Told what the first layer is called with, each time."""
        self._incoming: torch.Tensor | None = None
        self.skeleton.layers[layers.start].register_forward_pre_hook(self._enter, with_kwargs=True)
        if not self.is_last:
            self.skeleton.layers[layers.stop - 1].register_forward_hook(_leave)
        if weights is None:
            _randomize(self.skeleton.model, device)
            if self.is_first:
                torch.nn.init.normal_(self.skeleton.embedding.weight, std=_APART)
        else:
            _load(self.skeleton.model, weights, device=device, dtype=dtype)

    def cache(self, rows: int, *, cached_tokens: int = 0) -> RequestCache:
        """An empty cache for a request of at most so many tokens."""
        return RequestCache(self.found.text, self.layers, rows=rows, cached_tokens=cached_tokens)

    @cached_property
    def is_recordable(self) -> bool:
        """Whether its chunks can be recorded: memory stays where it is, and no layer waits for the host."""
        cache = self.cache(_TRIED)
        hidden = torch.zeros(_TRIED, self.found.text.hidden_size, device=self.device, dtype=self.dtype)
        return cache.is_static and can_record(lambda: self.run(hidden, cache, 0), self.device)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] -> hidden states [T, hidden] as the decoder takes them."""
        hidden: torch.Tensor = self.skeleton.embedding(token_ids[None])[0]
        return hidden

    def run(self, hidden: torch.Tensor, cache: RequestCache, context: int) -> torch.Tensor:
        """Tokens [T, hidden] of one request after `context` ones -> [T, hidden]; behind the last layer normed."""
        cache.begin(context)
        count = hidden.shape[0]
        self._incoming = hidden[None]
        try:
            made = self.skeleton.decoder(
                inputs_embeds=self._incoming,
                position_ids=torch.arange(context, context + count, device=self.device)[None],
                past_key_values=cache.cache,
                use_cache=True,
            ).last_hidden_state
        except _LeaveError as left:
            made = left.hidden
        finally:
            self._incoming = None
        cache.advance(count)
        out: torch.Tensor = made[0]
        return out

    def next_ids(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normed hidden states [R, hidden] -> the likeliest ids [R]; what comes behind the head keeps their order."""
        ids: torch.Tensor = self.skeleton.head(hidden).argmax(dim=-1)
        return ids

    def _enter(
        self, _layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.is_first:
            args = (self._incoming, *args[1:]) if args else args
            kwargs = kwargs if args else kwargs | {"hidden_states": self._incoming}
        if self.entered is not None:
            self.entered(args, kwargs)
        return args, kwargs


def _leave(_layer: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    raise _LeaveError(output[0] if isinstance(output, tuple) else output)


def _strip(skeleton: Skeleton, layers: range, *, embeds: bool, heads: bool) -> None:
    """Leave out of the model what the part does not run: other layers, towers of other inputs, its ends."""
    for index in range(len(skeleton.layers)):
        if index not in layers:
            skeleton.layers[index] = _Passed(skeleton.layers[index])
    kept = {id(module) for module in skeleton.decoder.modules()}
    kept |= {id(skeleton.decoder), id(skeleton.head)}
    for name, module in list(skeleton.model.named_modules()):
        holds = any(id(inner) in kept for inner in module.modules())
        if name and not holds and _parent(skeleton.model, name) is not None:
            _replace(skeleton.model, name)
    tied = bool(skeleton.model.all_tied_weights_keys)
    if not embeds and not (heads and tied):
        _replace_module(skeleton.model, skeleton.embedding)
    if not heads:
        _replace_module(skeleton.model, skeleton.head)
    if not (heads and tied):
        skeleton.model.all_tied_weights_keys = {}


def _parent(model: Any, name: str) -> Any:
    path, _, _ = name.rpartition(".")
    try:
        return model.get_submodule(path) if path else model
    except AttributeError:
        return None  # its parent was replaced


def _replace(model: Any, name: str) -> None:
    setattr(_parent(model, name), name.rpartition(".")[2], torch.nn.Identity())


def _replace_module(model: Any, module: Any) -> None:
    for name, found in model.named_modules():
        if found is module:
            _replace(model, name)
            return


def _randomize(model: Any, device: torch.device) -> None:
    """Numbers as the library initializes them."""
    model.to_empty(device=device)
    model.tie_weights(recompute_mapping=False)
    model.initialize_weights()


def _load(model: Any, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
    """Read the tensors of the model's parameters, renamed and fused as the library does; others are not read."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    files: Sequence[Path] = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError("weights", folder, "must hold safetensors")
    loading = LoadStateDictConfig(
        pretrained_model_name_or_path=str(folder),
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        info, _ = model._load_pretrained_model(model, None, [str(file) for file in files], loading)
        missing = sorted(info.missing_keys - set(model.all_tied_weights_keys))
        if missing:
            raise UserError(missing[0], "missing", f"must be in the weights at {folder}")
        if info.mismatched_keys:
            raise UserError("weights", sorted(map(str, info.mismatched_keys))[0], "must have the configuration's shape")
        model._finalize_model_loading(model, loading, info)
    finally:
        logging.set_verbosity(level)
    model.eval()
