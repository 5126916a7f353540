"""The error tree, and its one wire form."""

from __future__ import annotations

import inspect
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import errors
from service.errors import MAX_BODY_BYTES, GatewayError, InvalidField, render

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, GatewayError)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_renders_as_problem_details_with_openais_object_inside(kind):
    response = render(kind("what happened", param="n"), "req_1")
    body = json.loads(bytes(response.body))
    assert response.media_type == "application/problem+json"
    assert {"type", "title", "status", "detail", "instance", "error"} <= body.keys()
    assert body["status"] == response.status_code == kind.status
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] == body["detail"] == "what happened"
    assert body["type"] == f"urn:bonsai:error:{kind.default_code}"
    openai_type = "invalid_request_error" if kind.status < 500 else "server_error"
    expected = ["rate_limit_exceeded"] * 2 if kind.status == 429 else [openai_type, kind.default_code]
    assert [body["error"]["type"], body["error"]["code"]] == expected


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind.status in (429, 503)], ids=lambda k: k.__name__)
def test_429_and_503_say_when_to_come_back(kind):
    assert int(render(kind("away"), "req_1").headers["Retry-After"]) >= 1


def test_the_tree_at_the_top_of_the_module_is_the_tree():
    """Each class stands there once with its own status or its parent's, and its own code."""
    drawn = dict(re.findall(r"[├└]── (\w+) .*?([a-z_]+)(?:  .*)?$", str(errors.__doc__), re.MULTILINE))
    assert drawn.keys() == {kind.__name__ for kind in CLASSES} - {"GatewayError"}
    for line in str(errors.__doc__).splitlines():
        for kind in CLASSES:
            if re.search(rf"── {kind.__name__} ", line):
                assert kind.default_code in line
                assert re.search(rf"\b{kind.status}\b", line) or kind.status == getattr(kind.__base__, "status", None)


FACTS = st.dictionaries(st.text(max_size=10), st.text(max_size=3000))


@given(st.text(max_size=5000), st.text(max_size=2000), FACTS)
def test_no_body_is_longer_than_4_kib(message, param, facts):
    """Whatever a message came to hold, surrogates and controls included."""
    response = render(InvalidField(message, param=param, facts=facts), "req_1")
    assert len(response.body) <= MAX_BODY_BYTES
    assert json.loads(bytes(response.body))["status"] == 422
