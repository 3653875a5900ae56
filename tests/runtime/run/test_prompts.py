"""Prompt files: ids or text, matched with the plan's requests, every mistake named by its line or request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from db.errors import UserError
from runtime.run.prompts import Tokenizer, random_prompts, read_prompts
from tests.checkpoints import write_tokenizer
from tests.runtime.cases import requests

REQUESTS = requests(3, 2)


def _file(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_ids_come_in_the_plans_order(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"id": "r1", "token_ids": [4, 5]}', "", '{"id": "r0", "token_ids": [1, 2, 3]}')
    assert read_prompts(path, REQUESTS, Tokenizer(None)) == (((1, 2, 3), (4, 5)), False)


def test_text_is_tokenized_by_the_weights_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    path = _file(tmp_path, '{"id": "r0", "text": "abc"}', '{"id": "r1", "text": "ba"}')
    (first, second), is_text = read_prompts(path, REQUESTS, tokenizer)
    assert is_text
    assert (len(first), second) == (3, (first[1], first[0]))
    assert tokenizer.decode(first).replace(" ", "") == "abc"


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    name = "a\u2028b\u2029c\u0085d"
    path = tmp_path / "prompts.jsonl"
    line = json.dumps({"id": name, "token_ids": [1, 2]}, ensure_ascii=False)
    path.write_text(line + "\r\n", encoding="utf-8")
    assert read_prompts(path, (replace(requests(2)[0], id=name),), Tokenizer(None)) == (((1, 2),), False)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{"], ("line 1", "must be JSON")),
        (['{"id": "r0"}'], ("line 1", "exactly one of token_ids and text")),
        (['{"id": "r0", "token_ids": [1], "text": "a"}'], ("line 1", "exactly one")),
        (['{"id": "r0", "token_ids": ["a"]}'], ("line 1", "token_ids[0]")),
        (['{"id": 7, "token_ids": [1]}'], ("line 1", "id: 7")),
        (['{"id": "r0", "token_ids": [1]}', '{"id": "r0", "token_ids": [1]}'], ("line 2", "id: r0", "once")),
        (['{"id": "r0", "token_ids": [1]}'], ("id: r1; no prompt", "r0, r1")),
        ([json.dumps({"id": f"r{i}", "token_ids": [1]}) for i in range(3)], ("id: r2", "r0, r1")),
        (['{"id": "r0", "text": "a"}', '{"id": "r1", "text": "a"}'], ("text", "token_ids")),
    ],
)
def test_mistakes_are_named(lines: list[str], words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_prompts(_file(tmp_path, *lines), REQUESTS, Tokenizer(None))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_file_and_a_missing_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--prompts: .*absent\.jsonl"):
        read_prompts(tmp_path / "absent.jsonl", REQUESTS, Tokenizer(None))
    path = _file(tmp_path, '{"id": "r0", "text": "a"}', '{"id": "r1", "text": "a"}')
    with pytest.raises(UserError, match="tokenizer"):
        read_prompts(path, REQUESTS, Tokenizer(tmp_path))


def test_random_prompts_repeat_with_their_seed() -> None:
    made = random_prompts(REQUESTS, 50)
    assert [len(ids) for ids in made] == [3, 2]
    assert made == random_prompts(REQUESTS, 50) != random_prompts(REQUESTS, 50, seed=1)
    assert all(0 <= token < 50 for ids in made for token in ids)
