"""A checkpoint written shard by shard beside its place, and moved there when all of it is written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from db.errors import UserError
from runtime.weights.checkpoint import INDEX

SHARD_BYTES = 512 << 20
# What stands beside the weights and does not say how they are kept.
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "*.md")
_WRITTEN = ("config.json", INDEX, "hf_quant_config.json", "recipe.yaml")


class CheckpointWriter:
    """Collects tensors into shards of about half a GiB; the folder appears whole at the end, or not at all.

    A process that is killed leaves a hidden folder `.NAME.*.partial` beside it, which nothing takes for a checkpoint;
    `partial` gives it a name, under which nothing else may be written: what an earlier process left there is removed.
    """

    def __init__(self, folder: Path, source: Path, partial: Path | None = None) -> None:
        if not folder.absolute().parent.is_dir():
            raise UserError("--output", folder, "must be in a folder that exists")
        self.folder, self.source, self.named = folder.absolute(), source, partial
        self.held: dict[str, torch.Tensor] = {}
        self.places: set[int] = set()
        self.held_bytes, self.total_bytes = 0, 0
        self.weight_map: dict[str, str] = {}
        self.num_shards = 0
        self.partial: Path | None = None

    def __enter__(self) -> CheckpointWriter:
        try:
            if self.named is None:
                prefix = f".{self.folder.name[:40]}."
                self.partial = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=self.folder.parent))
            else:
                shutil.rmtree(self.named, ignore_errors=True)
                self.named.mkdir(0o700)
                self.partial = self.named
        except OSError as error:
            raise UserError("--output", self.folder, f"cannot be written ({error.strerror})") from None
        return self

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self.partial is not None:
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a tensor of the checkpoint."""
        size = tensor.numel() * tensor.element_size()
        if self.held and self.held_bytes + size > SHARD_BYTES:
            self._flush()
        # Parts of a larger tensor, and one tensor under two names, would be refused.
        is_part = tensor.untyped_storage().nbytes() != size or tensor.data_ptr() in self.places
        self.held[name] = tensor.to("cpu", copy=is_part).contiguous()
        self.places.add(self.held[name].data_ptr())
        self.held_bytes += size
        self.total_bytes += size

    def finish(self, config: dict[str, Any], before: Callable[[], None] = lambda: None) -> None:
        """Write the rest, the index and the configuration, copy what stands beside them, and move all into place.

        before: called when all is written, before it is moved.
        """
        assert self.partial is not None
        self._flush()
        for path in config_files(self.source):
            self._written(shutil.copyfile, path, self.partial / path.name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}
        for name, content in ((INDEX, index), ("config.json", config)):
            self._written((self.partial / name).write_text, json.dumps(content, indent=2) + "\n")
        mode = 0o777 & ~_umask()
        self.partial.chmod(mode)
        for path in self.partial.iterdir():
            path.chmod(mode & 0o666)
        before()
        self._written(os.rename, self.partial, self.folder)
        self.partial = None

    def _flush(self) -> None:
        if not self.held:
            return
        assert self.partial is not None
        self.num_shards += 1
        name = f"model-{self.num_shards:05d}.safetensors"
        self._written(save_file, self.held, self.partial / name, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(self.held, name)
        self.held, self.held_bytes = {}, 0
        self.places.clear()

    def _written(self, write: Any, *arguments: Any, **named: Any) -> None:
        try:
            write(*arguments, **named)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError("--output", self.folder, f"cannot be written ({reason})") from None


def config_files(source: Path) -> list[Path]:
    """What stands beside a checkpoint's weights and its configuration, and holds for a changed model too."""
    found = (path for pattern in _COPIED for path in source.glob(pattern))
    return [path for path in found if path.is_file() and path.name not in _WRITTEN]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
