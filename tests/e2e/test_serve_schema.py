"""The service against its own OpenAPI document: schemathesis asks what may and may not be asked."""

from __future__ import annotations

import json
from urllib.request import urlopen

import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings
from hypothesis.strategies import composite
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.services import Served

CHECKS = (
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_headers_conformance, response_schema_conformance,
)


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    data = tmp_path_factory.mktemp("serve") / "data"
    options = ("--per-minute", "100000", "--pending", "5")  # so that the rest is refused: 429
    with Served(tiny_model, data, *options) as served:
        yield served


@pytest.fixture(scope="module")
def operations(served):
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    found = [result.ok() for result in document.get_all_operations()]
    return [each for each in found if each.path != "/v1/events"]  # which never ends


def ask_each(operations, mode, max_examples):
    """Every operation with data that its schema allows, or doesn't."""
    for operation in operations:
        # 503 is readiness's own answer while a runner comes back
        ask_one(operation, mode, max_examples, CHECKS[1:] if operation.path == "/ready" else CHECKS)


@composite
def cases(draw, operation, mode):
    """What schemathesis asks, but forms whose file its own check of wrong values can't read."""
    try:
        return draw(operation.as_strategy(generation_mode=mode))
    except ValueError as error:  # of schemathesis 4.32.5
        if "Unsupported type: 'Binary'" not in str(error):
            raise
        reject()


def ask_one(operation, mode, max_examples, checks):
    @settings(max_examples=max_examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(case=cases(operation, mode))
    def ask(case):
        case.call_and_validate(checks=checks, timeout=60)

    ask()


def test_files_stand_in_forms_alone(served):
    paths = json.loads(urlopen(f"{served.url}/openapi.json").read())["paths"]
    content = paths["/v1/videos"]["post"]["requestBody"]["content"]
    assert "binary" not in json.dumps(content["application/json"])
    assert "binary" in json.dumps(content["multipart/form-data"])


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_operation_keeps_to_the_document(operations, mode):
    assert len(operations) > 25
    ask_each([each for each in operations if mode.is_positive or can_be_wrong(each)], mode, 3)


@pytest.mark.long
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_operation_at_length(operations, mode):
    ask_each([each for each in operations if mode.is_positive or can_be_wrong(each)], mode, 300)


def can_be_wrong(operation):
    """Whether an operation takes anything that a schema could refuse."""
    return bool(operation.body or operation.query)
