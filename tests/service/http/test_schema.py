"""Calls made of the API's own description: none may bring the service into trouble."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Unsatisfiable

from tests.service.http.conftest import Served

CALLS = int(os.environ.get("ISOCHUNK_SCHEMA_CALLS", "25"))
"""Of each operation; `ISOCHUNK_SCHEMA_CALLS=1000` makes some 20,000 in all."""


@pytest.mark.timeout(int(os.environ.get("ISOCHUNK_SCHEMA_TIMEOUT_S", "280")))
def test_no_call_brings_trouble(served: Served) -> None:
    schema = schemathesis.openapi.from_dict(served.app.openapi())
    num_calls, statuses = 0, set()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:
        if operation.path.endswith("/events") or (operation.method == "delete" and "session" in operation.path):
            continue  # what lasts, and what ends the caller's session

        @settings(
            max_examples=CALLS, database=None, deadline=None, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck), derandomize=bool(os.environ.get("CI")),
        )  # fmt: skip
        @schemathesis_given(operation)
        def call(case: schemathesis.Case) -> None:
            nonlocal num_calls
            answer = served.client.request(
                case.method,
                case.formatted_path,
                params=case.query or None,
                json=case.body if isinstance(case.body, dict | list | str | int | float | bool) else None,
            )
            num_calls += 1
            statuses.add(answer.status_code)
            assert answer.status_code < 500 or answer.status_code == 503, (
                case.method,
                case.formatted_path,
                answer.text,
            )

        try:
            call()
        except Unsatisfiable:
            continue
    print(f"{num_calls} calls of {len(operations)} operations: statuses {sorted(statuses)}")
    assert num_calls > 10 * CALLS
    assert {200, 422} <= statuses


def schemathesis_given(operation: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Hypothesis's `given` over the cases of an operation."""
    from hypothesis import given

    return given(case=operation.as_strategy())
