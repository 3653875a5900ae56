"""The comparison with Transformers says what differs, where, and by how little the reference chose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.run.reference import TokenCheck, check_tokens
from runtime.run.result import RequestResult, cut_at_end
from tests.runtime.cases import prompts
from tests.runtime.conftest import Generate

PROMPTS = prompts(40, 23)


@pytest.fixture
def check(checkpoint: Callable[[str], Path]) -> Callable[..., tuple[TokenCheck, ...]]:
    def run(*token_ids: tuple[int, ...], end_ids: frozenset[int] = frozenset()) -> tuple[TokenCheck, ...]:
        results = [RequestResult(id=f"r{i}", token_ids=ids, ttft_s=1.0) for i, ids in enumerate(token_ids)]
        return check_tokens(
            results, PROMPTS, checkpoint("qwen3"), dtype="float32", max_new_tokens=4, end_ids=end_ids
        )  # fmt: skip

    return run


@pytest.fixture
def expected(checkpoint: Callable[[str], Path], generate: Generate) -> list[tuple[int, ...]]:
    return [generate(checkpoint("qwen3"), prompt, 4) for prompt in PROMPTS]


@pytest.mark.timeout(60)
def test_equal_and_unequal_tokens(
    check: Callable[..., tuple[TokenCheck, ...]], expected: list[tuple[int, ...]]
) -> None:
    wrong = (*expected[1][:2], (expected[1][2] + 1) % 211, expected[1][3])
    good, bad = check(expected[0], wrong)
    assert good == TokenCheck(id="r0", equal=True, expected=expected[0])
    assert (bad.equal, bad.first_mismatch, bad.expected) == (False, 2, expected[1])
    assert bad.top2_margin is not None
    assert bad.top2_margin > 0


@pytest.mark.timeout(60)
def test_the_end_of_a_text_ends_both(
    check: Callable[..., tuple[TokenCheck, ...]], expected: list[tuple[int, ...]]
) -> None:
    end_ids = frozenset({expected[0][1]})
    cut = [cut_at_end(ids, end_ids) for ids in expected]
    assert len(cut[0]) <= 2
    assert all(one.equal for one in check(*cut, end_ids=end_ids))
    longer, _ = check(expected[0], cut[1], end_ids=end_ids)
    assert (longer.equal, longer.first_mismatch, longer.top2_margin) == (False, len(cut[0]), None)
