"""Prompts of a run: lines of a JSONL file matched with the plan's requests, or random ids of the planned lengths."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db.errors import UserError, cut
from db.files.documents import read_json_lines
from tuner.plan.plan import Request

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """A line of a prompts file: `{"id": ..., "token_ids": [...]}` or `{"id": ..., "text": ...}`."""

    id: str
    token_ids: TokenIds | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.token_ids is None) == (self.text is None):
            raise UserError("token_ids", "", "exactly one of token_ids and text is needed")


class Tokenizer:
    """The tokenizer in a folder of weights, loaded when it is first needed."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._loaded: Any = None

    def encode(self, text: str) -> TokenIds:
        """Token ids of a text, special tokens as the tokenizer adds them."""
        return tuple(self._tokenizer()(text)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self._tokenizer().decode(list(token_ids)))

    def _tokenizer(self) -> Any:
        if self.folder is None:
            raise UserError("--prompts", "text", "random weights have no tokenizer; give token_ids")
        if self._loaded is None:
            from transformers import AutoTokenizer

            try:
                self._loaded = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            except Exception as error:  # the library raises Exception itself for a file that it cannot read
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError("tokenizer", self.folder, f"text prompts need one there ({reason})") from error
        return self._loaded


def read_prompts(path: Path, requests: Sequence[Request], tokenizer: Tokenizer) -> tuple[tuple[TokenIds, ...], bool]:
    """Token ids of each request from a JSONL file, in the plan's order, and whether they were given as text.

    Raises `UserError` naming the line or the request that is wrong.
    """
    lines: dict[str, PromptLine] = {}
    for _, place, line in read_json_lines(path, PromptLine, field="--prompts"):
        if line.id in lines:
            raise UserError(f"{place}: id", line.id, "each id may stand once")
        lines[line.id] = line
    _check_ids(path, lines, requests)
    chosen = [lines[request.id] for request in requests]
    prompts = tuple(
        line.token_ids if line.token_ids is not None else tokenizer.encode(line.text or "") for line in chosen
    )
    return prompts, any(line.text is not None for line in chosen)


def random_prompts(requests: Sequence[Request], vocab_size: int, *, seed: int = 0) -> tuple[TokenIds, ...]:
    """Random token ids of the planned lengths, the same for the same seed."""
    source = random.Random(seed)
    return tuple(tuple(source.choices(range(vocab_size), k=request.prompt_tokens)) for request in requests)


def check_prompts(prompts: Sequence[TokenIds], requests: Sequence[Request], vocab_size: int) -> None:
    """Raise `UserError` unless each prompt has its planned length and ids of the vocabulary."""
    if len(prompts) != len(requests):
        raise UserError("prompts", f"{len(prompts)} prompts", f"one for each of the plan's {len(requests)} requests")
    for prompt, request in zip(prompts, requests, strict=True):
        if len(prompt) != request.prompt_tokens:
            allowed = f"the plan runs exactly {request.prompt_tokens}"
            raise UserError(f"prompts[{request.id}]", f"{len(prompt)} tokens", allowed)
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise UserError(f"prompts[{request.id}]", f"token id {token}", f"0 to {vocab_size - 1}")


def _check_ids(path: Path, lines: Mapping[str, PromptLine], requests: Sequence[Request]) -> None:
    ids: dict[str, int] = {}
    for index, request in enumerate(requests):
        if ids.setdefault(request.id, index) != index:
            raise UserError(f"requests[{index}].id", request.id, "prompts need an id of its own for each request")
    known = f"the plan's requests are {cut(', '.join(ids), 400)}"
    for name in ids:
        if name not in lines:
            raise UserError(f"{cut(path)}: id", name, f"no prompt with this id; {known}")
    for name in lines:
        if name not in ids:
            raise UserError(f"{cut(path)}: id", name, known)
