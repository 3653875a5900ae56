"""What Transformers' `generate` makes of the same prompts and weights: the reference that tokens must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from profiler.model import PRECISIONS
from runtime.run.prompts import TokenIds
from runtime.run.result import RequestResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCheck:
    """One request's new tokens beside those of Transformers."""

    id: str
    equal: bool
    expected: TokenIds
    first_mismatch: int | None = None  # index among the new tokens
    top2_margin: float | None = None  # between the reference's two largest logits there; small: either choice is fair


def check_tokens(
    results: Sequence[RequestResult],
    prompts: Sequence[TokenIds],
    weights: Path,
    *,
    dtype: str,
    max_new_tokens: int,
    end_ids: frozenset[int],
    device_type: str = "cpu",
) -> tuple[TokenCheck, ...]:
    """Run `generate` greedily in the same dtype, one prompt at a time, and compare token by token."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        weights, dtype=PRECISIONS[dtype].weights.torch_dtype, local_files_only=True
    ).to(device_type)
    # A configuration of our own: a checkpoint's may sample or punish repetition.
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return tuple(_check(model, result, prompt) for result, prompt in zip(results, prompts, strict=True))


@torch.inference_mode()
def _check(model: Any, result: RequestResult, prompt: TokenIds) -> TokenCheck:
    input_ids = torch.tensor([prompt], device=model.device)
    made = model.generate(input_ids, attention_mask=torch.ones_like(input_ids))
    expected = tuple(made.sequences[0, len(prompt) :].tolist())
    if result.token_ids == expected:
        return TokenCheck(id=result.id, equal=True, expected=expected)
    pairs = enumerate(zip(result.token_ids, expected, strict=False))
    first = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(result.token_ids), len(expected)))
    margin = None
    if first < len(made.scores):
        top2 = made.scores[first][0].float().topk(2).values
        margin = float(top2[0] - top2[1])
    return TokenCheck(id=result.id, equal=False, expected=expected, first_mismatch=first, top2_margin=margin)
