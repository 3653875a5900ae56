"""Layers of different widths run as the same layers do whose other units are silent, which Transformers can run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from db.errors import UserError
from profiler.model import load_model_shape, model_from_config
from runtime.run.run import run_plans
from tests.runtime.cases import make_plan, prompts
from tests.runtime.conftest import Generate

CHANNELS, KV_HEADS = (112, 40, 64, 16, 112), (2, 1, 2, 2, 1)  # of 112 and 2, two query heads each
HEADS = tuple(2 * count for count in KV_HEADS)
SIZES = {"intermediate_size": CHANNELS, "num_key_value_heads": KV_HEADS, "num_attention_heads": HEADS}


def cut_and_silent(source: Path, place: Path) -> tuple[Path, Path]:
    """The first units of each layer alone, and all of them with the others' outputs at zero."""
    config, cut = json.loads((source / "config.json").read_text()), dict[str, torch.Tensor]()
    silent = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    head_dim = load_model_shape(str(source)).layer.attention.head_dim
    for name, tensor in silent.items():
        parts = name.split(".")
        if "layers" not in parts:
            cut[name] = tensor.clone()
            continue
        index = int(parts[2])
        kept = {
            "q_proj": HEADS[index] * head_dim, "k_proj": KV_HEADS[index] * head_dim,
            "v_proj": KV_HEADS[index] * head_dim, "gate_proj": CHANNELS[index], "up_proj": CHANNELS[index],
            "o_proj": HEADS[index] * head_dim, "down_proj": CHANNELS[index],
        }.get(parts[-2])  # fmt: skip
        if parts[-2] in ("o_proj", "down_proj"):
            tensor[:, kept:] = 0.0
            cut[name] = tensor[:, :kept].clone()
        else:
            cut[name] = tensor[:kept].clone()
    folders = place / "cut", place / "silent"
    for folder, tensors, sizes in zip(folders, (cut, silent), (SIZES, {}), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"head_dim": head_dim} | sizes))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folders


@pytest.mark.timeout(180)
def test_tokens_of_layers_of_different_widths(
    checkpoint: Callable[[str], Path], generate: Generate, tmp_path: Path, db_url: str
) -> None:
    cut, silent = cut_and_silent(checkpoint("llama"), tmp_path)
    shape = load_model_shape(str(cut))
    assert len(shape.layer_kinds) == 5
    assert shape.num_parameters < load_model_shape(str(silent)).num_parameters
    asked = prompts(202, 97)
    plans = [make_plan(cut, pp_size=2), make_plan(cut, tp_size=2, pp_size=1)]
    expected = [tuple(generate(silent, prompt, 3)) for prompt in asked]
    for result in run_plans(plans, weights=cut, prompts=asked, max_new_tokens=3, db_url=db_url):
        assert [request.token_ids for request in result.requests] == expected


def test_lists_of_sizes_are_checked(checkpoint: Callable[[str], Path]) -> None:
    config = dict(load_model_shape(str(checkpoint("llama"))).config) | {"head_dim": 16}
    for changed, message in (
        ({"intermediate_size": [112, 40]}, "intermediate_size: 2 numbers"),
        ({"intermediate_size": [112, 40, 0, 16, 112]}, "intermediate_size: 0"),
        ({"intermediate_size": list(CHANNELS), "head_dim": None}, "head_dim: None"),
        ({"num_key_value_heads": [2, 1, 3, 2, 1]}, "num_key_value_heads: 3"),
    ):
        with pytest.raises(UserError) as refused:
            model_from_config(config | changed, name="uneven")
        assert str(refused.value).startswith(message)
