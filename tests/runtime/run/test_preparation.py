"""Whatever does not fit together is refused before any rank starts, in one line that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from db.errors import UserError
from profiler.sequence.kind import SPKind
from runtime.run.run import run_plan
from runtime.weights.checkpoint import INDEX
from tests.runtime.cases import make_plan, prompts, requests
from tuner.plan.plan import Chunk, Parallel

O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_args: object, **_options: object) -> None:
        pytest.fail("ranks were started")

    monkeypatch.setattr("runtime.run.run.run_ranks", start)


@pytest.fixture
def weights(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


def _refused(weights: Path, db_url: str, plan: Mapping[str, Any] | None = None, /, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        run_plan(make_plan(weights, **plan or {}), **{"weights": weights, "db_url": db_url} | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"precision": "int3"}, ("precision: int3", "bfloat16")),
        ({"parallel": Parallel(tp_size=3, pp_size=1, layer_partition=(5,))}, ("tp_size: 3", "num_attention_heads = 4")),
        ({"parallel": Parallel(tp_size=1, pp_size=2, layer_partition=(2, 2))}, ("layer_partition: [2, 2]", "5")),
        ({"parallel": Parallel(tp_size=1, pp_size=6, layer_partition=(1,) * 6)}, ("pp_size: 6", "at most 5")),
        (
            {"parallel": Parallel(tp_size=1, pp_size=2, sp_size=8, sp_kind=SPKind.ULYSSES, layer_partition=(2, 3))},
            ("sp_size: 8", "at most 4 with sp_kind ulysses"),
        ),
        ({"requests": requests(600), "rounds": ((Chunk(0, 0, 600),),)}, ("prompt_tokens: 600", "512")),
        ({"model": {"hidden_size": 128}}, ("model.hidden_size: 128", "must be 64")),
    ],
)
def test_plans_that_do_not_fit(plan: Mapping[str, Any], words: tuple[str, ...], weights: Path, db_url: str) -> None:
    message = _refused(weights, db_url, plan)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, ("--max-new-tokens: 0", "at least 1")),
        ({"repeat": 0}, ("--repeat: 0", "at least 1")),
        ({"num_threads": 0}, ("--threads-per-rank: 0", "at least 1")),
        ({"max_new_tokens": 400}, ("prompt_tokens: 202", "at most 113")),
        ({"max_new_tokens": 10**20}, ("--max-new-tokens: 100000000000000000000", "at most 512")),
        ({"random_weights": True}, ("--weights",)),
        ({"weights": None}, ("--weights",)),
        ({"device_type": "tpu"}, ("device: tpu", "cpu or cuda")),
        ({"dtype": "int8"}, ("--dtype: int8", "float32")),
        ({"prompts": prompts(202)}, ("1 prompts", "2 requests")),
        ({"prompts": prompts(203, 97)}, ("prompts[r0]: 203 tokens", "exactly 202")),
        ({"prompts": [[211] * 202, [0] * 97]}, ("prompts[r0]: token id 211", "0 to 210")),
        ({"weights": Path("nowhere")}, ("weights: nowhere", "config.json")),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: tuple[str, ...], weights: Path, db_url: str) -> None:
    message = _refused(weights, db_url, **options)
    assert all(word in message for word in words), message


def test_not_enough_memory(weights: Path, db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from profiler.hardware.device import describe_hardware

    def small(*args: Any, **options: Any) -> Any:
        from dataclasses import replace

        return replace(describe_hardware(*args, **options), memory_bytes=100 << 20)

    monkeypatch.setattr("runtime.run.run.describe_hardware", small)
    assert "memory" in _refused(weights, db_url)


def test_a_missing_tensor(weights: Path, tmp_path: Path, db_url: str) -> None:
    def drop(index: dict[str, Any]) -> None:
        del index["weight_map"][O_PROJ]

    assert f"{O_PROJ}: missing" in _refused(weights, db_url, weights=_edited(weights, tmp_path, drop))


def test_a_missing_file(weights: Path, tmp_path: Path, db_url: str) -> None:
    def rename(index: dict[str, Any]) -> None:
        index["weight_map"][O_PROJ] = "model-00099-of-00099.safetensors"

    message = _refused(weights, db_url, weights=_edited(weights, tmp_path, rename))
    assert O_PROJ in message
    assert "model-00099-of-00099.safetensors" in message


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(64, 63), "shape [64, 63]; must be [64, 64]"),
        (torch.zeros(64, 64, dtype=torch.int8), "not floating point"),
    ],
)
def test_a_tensor_of_another_kind(tensor: torch.Tensor, words: str, weights: Path, tmp_path: Path, db_url: str) -> None:
    edited = _edited(weights, tmp_path, lambda index: None)
    path = edited / json.loads((edited / INDEX).read_text())["weight_map"][O_PROJ]
    save_file(load_file(path) | {O_PROJ: tensor}, path)
    assert f"{O_PROJ}: {words}" in _refused(weights, db_url, weights=edited)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_damaged_file(content: bytes, weights: Path, tmp_path: Path, db_url: str) -> None:
    edited = _edited(weights, tmp_path, lambda index: None)
    path = edited / json.loads((edited / INDEX).read_text())["weight_map"][O_PROJ]
    path.write_bytes(content)
    assert path.name in _refused(weights, db_url, weights=edited)


def test_a_damaged_index(weights: Path, tmp_path: Path, db_url: str) -> None:
    edited = _edited(weights, tmp_path, lambda index: None)
    (edited / INDEX).write_text("{")
    assert INDEX in _refused(weights, db_url, weights=edited)


def _edited(weights: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    folder = Path(shutil.copytree(weights, tmp_path / "edited"))
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder
