"""The API's description is true: schemathesis asks what it describes, and much else."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

KEY = "secret-key"
DEADLINES = {"request_timeout_s", "first_token_seconds"}


@schemathesis.check
def no_server_error_but_deadlines(ctx, response, case):
    """A request that sets a deadline of its own, down to 5e-324 s, may be answered by 504 (Gateway Timeout)."""
    asked = set(case.body) if isinstance(case.body, dict) else set()
    if response.status_code != 504 or not asked & DEADLINES:
        not_a_server_error(ctx, response, case)


CHECKS = [
    no_server_error_but_deadlines,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_what_is_described_is_so(server, mode):
    """Requests that follow the description, and requests that do not."""
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in described.get_all_operations()]
    assert len(operations) == 6
    for operation in operations:
        has_body = bool(operation.body)
        if mode is schemathesis.GenerationMode.NEGATIVE and not has_body:
            continue  # nothing about it could be wrong

        @settings(max_examples=15 if has_body else 2, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            case.call_and_validate(
                headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS, timeout=240
            )  # 64 answers of 8,000 tokens may be asked for

        ask()


def test_every_error_is_described(http):
    description = http.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        described = description["paths"][path]["post"]["responses"]
        assert set(described) == {"200", "400", "401", "404", "413", "429", "503", "504"}
    assert "HTTPValidationError" not in description["components"]["schemas"]
