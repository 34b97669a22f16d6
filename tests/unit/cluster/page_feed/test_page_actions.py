"""The bodies of actions: what they call, and how wrong ones are refused."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest

from moesaic.actors.controller.controller import Controller
from moesaic.cluster.page_feed.actions import ACTIONS, parsed_action
from moesaic.proto.errors import RequestError

EXPERT = {"model": "m", "layer": 1, "expert": 2}
GOOD: list[tuple[str, dict[str, Any], tuple[str, tuple[Any, ...]]]] = [
    ("plan", {}, ("plan", (None,))),
    ("plan", {"budget": 4}, ("plan", (4,))),
    ("rebalance", {}, ("rebalance", (None, "page"))),
    ("rollback", {"change": 3}, ("rollback", (3,))),
    ("drain", {"host": "h"}, ("drain", ("h", "page"))),
    ("undrain", {"host": "h"}, ("undrain", ("h", "page"))),
    ("pin", {**EXPERT, "host": "h"}, ("pin", (("m", 1, 2), "h", "page"))),
    ("unpin", {**EXPERT, "host": "h"}, ("unpin", (("m", 1, 2), "h", "page"))),
    ("replicate", {**EXPERT, "replicas": 2}, ("replicate", (("m", 1, 2), 2, "page"))),
    ("scale", {"group": 0, "hosts": 3}, ("scale", (3, 0, "page"))),
]
WRONG = [
    ("drain", {}, "host: Field required"),
    ("drain", {"host": ""}, "host: "),
    ("drain", {"host": "h" * 300}, "host: "),
    ("drain", {"host": 3}, "host: Input should be a valid string"),
    ("drain", {"host": "h", "force": True}, "force: Extra inputs"),
    ("pin", {**EXPERT, "layer": -1, "host": "h"}, "layer: "),
    ("pin", {**EXPERT, "layer": "1", "host": "h"}, "layer: "),
    ("replicate", {**EXPERT, "replicas": 0}, "replicas: "),
    ("scale", {"group": 0, "hosts": 0}, "hosts: "),
    ("scale", {"group": 0, "hosts": 1.5}, "hosts: "),
    ("rebalance", {"budget": True}, "budget: "),
]


@pytest.mark.parametrize(("name", "fields", "call"), GOOD)
def test_an_action_makes_its_call(
    name: str, fields: dict[str, Any], call: tuple[str, tuple[Any, ...]]
) -> None:
    found = parsed_action(name, json.dumps(fields).encode()).call()
    assert found == call
    # The controller has the method, and takes these arguments.
    method, arguments = found
    inspect.signature(getattr(Controller, method)).bind(None, *arguments)


def test_every_action_is_tried() -> None:
    assert {name for name, _, _ in GOOD} == ACTIONS.keys()


@pytest.mark.parametrize(("name", "fields", "words"), WRONG)
def test_a_wrong_body_is_refused_by_its_field(
    name: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parsed_action(name, json.dumps(fields).encode())
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"null"])
def test_a_body_that_is_no_object(body: bytes) -> None:
    with pytest.raises(RequestError, match="the body"):
        parsed_action("plan", body)
