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
CHECKS = [
    not_a_server_error,
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
            case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS, timeout=60)

        ask()


def test_every_error_is_described(http):
    description = http.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        described = description["paths"][path]["post"]["responses"]
        assert set(described) == {"200", "400", "401", "404", "413", "429", "503", "504"}
    assert "HTTPValidationError" not in description["components"]["schemas"]
