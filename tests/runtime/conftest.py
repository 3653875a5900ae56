from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

Generate = Callable[[Path, tuple[int, ...], int], tuple[int, ...]]


@pytest.fixture(scope="session")
def generate() -> Generate:
    """Transformers' own greedy tokens in float32, made once."""
    from transformers import AutoModelForCausalLM

    load = cache(lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))

    @cache
    def run(folder: Path, prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
        ids = torch.tensor([prompt])
        made = load(folder).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                                     do_sample=False, pad_token_id=0)  # fmt: skip
        return tuple(made[0, len(prompt) :].tolist())

    return run


@pytest.fixture
def db_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'runs.db'}"
