"""Prompts of a run: lines of a JSONL file matched with the plan's requests, or random ids of the planned lengths."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from db.errors import UserError
from tuner.plan import Request

TokenIds = tuple[int, ...]


class PromptLine(BaseModel):
    """A line of a prompts file: `{"id": ..., "token_ids": [...]}` or `{"id": ..., "text": ...}`."""

    model_config = ConfigDict(strict=True, frozen=True)

    id: str
    token_ids: TokenIds | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.token_ids is None) == (self.text is None):
            raise ValueError("exactly one of token_ids and text is needed")
        return self


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
            except (OSError, ValueError, KeyError) as error:
                reason = str(error).splitlines()[0]
                raise UserError("tokenizer", self.folder, f"text prompts need one there ({reason})") from error
        return self._loaded


def read_prompts(path: Path, requests: Sequence[Request], tokenizer: Tokenizer) -> tuple[tuple[TokenIds, ...], bool]:
    """Token ids of each request from a JSONL file, in the plan's order, and whether they were given as text.

    Raises `UserError` naming the line or the request that is wrong.
    """
    lines: dict[str, PromptLine] = {}
    for number, text in _numbered_lines(path):
        try:
            line = PromptLine.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            allowed = 'a line is {"id": "...", "token_ids": [...]} or {"id": "...", "text": "..."}'
            raise UserError(f"{path}:{number}", f"{where}: {first['msg']}".removeprefix(": "), allowed) from error
        if line.id in lines:
            raise UserError(f"{path}:{number}", f"id {line.id!r} again", "each id may stand once")
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
    ids = [request.id for request in requests]
    for index, name in enumerate(ids):
        if name in ids[:index]:
            raise UserError(f"requests[{index}].id", name, "prompts need an id of its own for each request")
        if name not in lines:
            raise UserError(str(path), f"no prompt with id {name!r}", "the plan's requests are " + ", ".join(ids))
    for name in lines:
        if name not in ids:
            raise UserError(str(path), f"id {name!r}", "the plan's requests are " + ", ".join(ids))


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--prompts", path, f"must be a readable JSONL file ({error})") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
