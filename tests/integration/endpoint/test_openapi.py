"""The endpoint against its own OpenAPI document: schemathesis writes requests that fit it, and such
that do not, and checks every answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.helpers.endpoint.service import running_service

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_service() as service:
        yield service.url


@pytest.fixture(scope="module")
def document(url: str) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        ("GET", "/v1/models", GenerationMode.POSITIVE),
        ("GET", "/v1/models/{model_id}", GenerationMode.POSITIVE),
        ("POST", "/v1/completions", GenerationMode.POSITIVE),
        ("POST", "/v1/completions", GenerationMode.NEGATIVE),
        ("POST", "/v1/chat/completions", GenerationMode.POSITIVE),
        ("POST", "/v1/chat/completions", GenerationMode.NEGATIVE),
    ],
)
def test_answers_are_as_documented(
    document: BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,
            HealthCheck.data_too_large,
        ],
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode), plain=st.booleans())
    def check(case: Case, plain: bool) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            # Nothing gets past the name of a model that there is not, and little past messages.
            case.body |= {"model": "tools", "max_tokens": 3}
            if plain and "messages" in case.body:
                case.body["messages"] = [{"role": "user", "content": "hi"}]
        statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

    check()
    if mode is GenerationMode.NEGATIVE:
        # 404: a name that no model has.
        assert set(statuses) <= {400, 404, 413}
    elif "{" not in path:
        assert statuses[200]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_parameter_is_in_the_document(url: str, path: str) -> None:
    found = httpx.get(f"{url}/openapi.json").json()
    schemas = found["components"]["schemas"]
    body = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    properties = schemas[body["$ref"].rpartition("/")[2]]["properties"]
    assert {"model", "temperature", "stop", "logit_bias", "moesaic", "n", "seed"} <= set(properties)
    assert properties["logit_bias"]["anyOf"][0]["patternProperties"] == {
        "^[0-9]+$": {"type": "number", "minimum": -100, "maximum": 100}
    }
    assert not [name for name in schemas if name.startswith("_")]
