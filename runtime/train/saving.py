"""Checkpoints on the way: written beside their place by all ranks, moved there whole, and read by Transformers.

A folder `step-N` holds the model as any checkpoint does, one file a stage, and beside it what only training needs: the
master copy and moments of each rank (`state-R.safetensors`), and `training.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from db.files.documents import read_json
from db.files.replacement import flush_to_disk
from runtime.quantize.writer import config_files
from runtime.train.parameters import Parameter, checkpoint_tensors
from runtime.weights.checkpoint import INDEX

NOTES = "training.json"
_KEPT = 2  # checkpoints that stay


def folder_of(root: Path, step: int) -> Path:
    """The checkpoint after so many steps."""
    return root / f"step-{step:08d}"


def latest(root: Path) -> Path | None:
    """The newest checkpoint that is whole: only such ones have their name."""
    found = sorted(path for path in root.glob("step-*") if (path / NOTES).is_file())
    return found[-1] if found else None


def read_notes(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its training."""
    notes: dict[str, Any] = read_json(folder / NOTES, field="--state")
    return notes


def read_state(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """What a rank kept."""
    state: dict[str, torch.Tensor] = load_file(folder / f"state-{rank}.safetensors")
    return state


def save(
    folder: Path,
    source: Path,
    *,
    rank: int,
    stage: int,
    is_first_tp: bool,
    tensor_group: dist.ProcessGroup | None,
    everyone: dist.ProcessGroup,
    parameters: Sequence[Parameter],
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    notes: Mapping[str, Any],
) -> None:
    """Write a checkpoint; all ranks call it. A kill at any moment leaves the one before, or this one whole."""
    part = folder.with_name(f".{folder.name}.partial")
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier(everyone)
    tensors = dict(_whole_tensors(parameters, tensor_group, is_first_tp, dtype))
    name = f"model-{stage + 1:05d}.safetensors"
    if is_first_tp:
        save_file(tensors, part / name, metadata={"format": "pt"})
    save_file({key: tensor.cpu() for key, tensor in state.items()}, part / f"state-{rank}.safetensors")
    mine = dict.fromkeys(tensors, name) if is_first_tp else {}
    sizes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) if is_first_tp else 0
    found: list[tuple[dict[str, str], int]] = [(mine, sizes)] * dist.get_world_size()
    dist.all_gather_object(found, (mine, sizes), group=everyone)
    if rank == 0:
        weight_map = {key: value for names, _ in found for key, value in names.items()}
        index = {"metadata": {"total_size": sum(size for _, size in found)}, "weight_map": weight_map}
        (part / INDEX).write_text(json.dumps(index))
        shutil.copyfile(source / "config.json", part / "config.json")
        for path in config_files(source):
            shutil.copyfile(path, part / path.name)
        (part / NOTES).write_text(json.dumps(dict(notes)))
        flush_to_disk(*part.iterdir())
        part.rename(folder)
        flush_to_disk(folder.parent)
        for old in sorted(folder.parent.glob("step-*"))[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier(everyone)


def take_model(folder: Path, output: Path) -> None:
    """The model of a checkpoint as a folder of its own, whole or not at all."""
    part = output.with_name(f".{output.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part, ignore=shutil.ignore_patterns("state-*", NOTES), copy_function=_linked)
    part.rename(output)


def _linked(source: str, target: str) -> str:
    """The same file under another name where the disk allows it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _whole_tensors(
    parameters: Sequence[Parameter],
    group: dist.ProcessGroup | None,
    is_first_tp: bool,
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors of a stage, gathered on its first rank."""
    for parameter in parameters:
        assert parameter.master is not None
        mine = parameter.master.detach().to(dtype).contiguous()
        parts = [mine]
        if parameter.is_cut and group is not None:
            parts = gathered(mine, group)
        if is_first_tp:
            for name, tensor in checkpoint_tensors(parameter, parts):
                yield name, tensor.cpu().contiguous().clone()


def gathered(mine: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The parts of all ranks, which may differ in their number of rows or columns."""
    size = dist.get_world_size(group)
    sizes = [torch.zeros(2, dtype=torch.int64, device=mine.device) for _ in range(size)]
    flat = mine if mine.dim() == 2 else mine[:, None]
    dist.all_gather(sizes, torch.tensor(flat.shape, device=mine.device), group=group)
    most = max(int(size.prod()) for size in sizes)
    padded = mine.new_zeros(most)
    padded[: mine.numel()] = mine.flatten()
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    shapes = [tuple(size.tolist()) for size in sizes]
    whole = [part[: rows * columns].view(rows, columns) for part, (rows, columns) in zip(parts, shapes, strict=True)]
    return whole if mine.dim() == 2 else [part[:, 0] for part in whole]
