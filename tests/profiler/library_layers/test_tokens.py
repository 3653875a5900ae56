"""Tokens of every architecture that is said to be held equal: chunks through two parts against Transformers' own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.masking_utils import sdpa_mask

from profiler.library.found import find
from profiler.library.verified import VERIFIED
from profiler.library_layers import attention
from profiler.library_layers.part import StagePart
from tests.library_models import TRAITS, write_model

NEW_TOKENS = 4
LENGTHS = (202, 75)
# (request, tokens) in the order in which they run: chunks of 100, 1, 37 and 64, two requests in turn.
CHUNKS = ((0, 100), (1, 38), (0, 1), (0, 37), (1, 37), (0, 64))


def test_all_that_are_named_have_a_small_model() -> None:
    assert set(VERIFIED) == set(TRAITS)


@pytest.mark.parametrize("architecture", VERIFIED)
@torch.inference_mode()
def test_chunks_through_two_parts_give_the_librarys_tokens(architecture: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", architecture)
    found = find(json.loads((folder / "config.json").read_text()))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 211, (length,), generator=generator) for length in LENGTHS]
    cut = found.num_layers // 2
    parts = [
        StagePart(found, layers, device=torch.device("cpu"), dtype=torch.float32, weights=folder)
        for layers in (range(cut), range(cut, found.num_layers))
    ]
    expected = _generated(found.model_class, folder, prompts)
    assert _chunked(parts, prompts) == expected
    assert len({token for tokens in expected for token in tokens}) > 1  # not one token over and over


def _generated(kind: Any, folder: Path, prompts: Sequence[torch.Tensor]) -> list[list[int]]:
    model = kind.from_pretrained(folder, dtype=torch.float32)
    made = [
        model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=0,
        )
        for prompt in prompts
    ]  # fmt: skip
    return [ids[0, len(prompt) :].tolist() for ids, prompt in zip(made, prompts, strict=True)]


def _chunked(parts: Sequence[StagePart], prompts: Sequence[torch.Tensor]) -> list[list[int]]:
    caches = [[part.cache(len(prompt) + NEW_TOKENS) for part in parts] for prompt in prompts]

    def run(request: int, ids: torch.Tensor) -> torch.Tensor:
        hidden = parts[0].embed(ids)
        for part, cache in zip(parts, caches[request], strict=True):
            hidden = part.run(hidden, cache, cache.length)
        return parts[-1].next_ids(hidden[-1:])

    ids: dict[int, torch.Tensor] = {}
    for request, count in CHUNKS:
        start = caches[request][0].length
        ids[request] = run(request, prompts[request][start : start + count])
    tokens = [[int(ids[request])] for request in range(len(prompts))]
    for _ in range(NEW_TOKENS - 1):
        for request, chosen in enumerate(tokens):
            chosen.append(int(run(request, torch.tensor(chosen[-1:]))))
    return tokens


@pytest.mark.parametrize(("architecture", "masks"), [("LlamaForCausalLM", False), ("Gemma3ForCausalLM", True)])
@torch.inference_mode()
def test_only_what_is_more_than_causal_has_a_mask(
    architecture: str, masks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "model", architecture)
    found = find(json.loads((folder / "config.json").read_text()))
    part = StagePart(found, range(found.num_layers), device=torch.device("cpu"), dtype=torch.float32, weights=folder)
    made: list[object] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(sdpa_mask(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(attention, "sdpa_mask", noted)
    cache = part.cache(LENGTHS[0])
    for start, count in ((0, 100), (100, 102)):
        part.run(part.embed(torch.arange(start, start + count)), cache, start)
    assert any(mask is not None for mask in made) == masks
