"""The one tree of errors: what the docstring draws, what crosses the wire, what HTTP answers."""

from __future__ import annotations

import pickle
import re

import pytest

from moesaic.actors.http_responses import error_response
from moesaic.calls import error_of
from moesaic.proto import errors
from moesaic.proto.errors import (
    ERRORS,
    BadInput,
    InternalError,
    MoesaicError,
    RequestError,
    Retryable,
    from_wire,
)
from moesaic.proto.expert_pb2 import Frame

ALL = sorted(ERRORS.items())
NAMES = [name for name, _ in ALL]
every_class = pytest.mark.parametrize("cls", [cls for _, cls in ALL], ids=NAMES)


def drawn_tree() -> dict[str, str | None]:
    """{class: parent} as the module's docstring draws it."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for indented in (errors.__doc__ or "").splitlines():
        line = indented.removeprefix("    ")
        found = re.match(r"^((?:[|`] {3}| {4})*)(?:\|-- |`-- )?(\w+)(?:  .*)?$", line)
        if not found or found[2] not in vars(errors):
            continue
        depth = 0 if line[0] not in "|`" else len(found[1]) // 4 + 1
        parents[found[2]] = above[depth - 1] if depth else None
        above = [*above[:depth], found[2]]
    return parents


def test_the_drawn_tree_is_the_real_one() -> None:
    real = {name: None if cls is MoesaicError else cls.__bases__[0].__name__ for name, cls in ALL}
    assert drawn_tree() == real


def test_every_error_of_the_module_is_in_the_table() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == set(ERRORS)
    assert len(ERRORS) >= 18


@every_class
def test_errors_cross_the_wire_as_themselves(cls: type[MoesaicError]) -> None:
    text = "expert 3 of layer 1 of m: größer than 10 %"
    frame = Frame()
    frame.refusal.code, frame.refusal.message = cls(text).code, text
    arrived = Frame.FromString(frame.SerializeToString()).refusal
    again = from_wire(arrived.code, arrived.message)
    assert type(again) is cls
    assert str(again) == text
    assert again.code == cls.__name__


@every_class
def test_errors_cross_http_as_themselves(cls: type[MoesaicError]) -> None:
    error = cls("prompt: too long")
    if isinstance(error, RequestError):
        error.param = "prompt"
    again = error_of(error_response(error).model_dump()["error"])
    assert type(again) is cls
    assert str(again) == "prompt: too long"
    if isinstance(again, RequestError):
        assert again.param == "prompt"


@every_class
def test_errors_cross_ray_as_themselves(cls: type[MoesaicError]) -> None:
    error = cls("boom")
    if isinstance(error, RequestError):
        error.param = "model"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (str(again), vars(again)) == ("boom", vars(error))


@pytest.mark.parametrize("code", ["", "KeyError", "Exception", "busy", "Busy ", "__class__"])
def test_unknown_codes_are_internal_errors_that_name_the_code(code: str) -> None:
    error = from_wire(code, "something")
    assert type(error) is InternalError
    assert str(error) == f"{code}: something"


# What the endpoint answers, and whether a client may send the same request again.
STATUS = {
    "RequestError": 400,
    "UnknownModel": 404,
    "BodyTooLarge": 413,
    "Busy": 429,
    "Expired": 504,
    "NotHere": 503,
    "HostLost": 503,
    "ExpertUnavailable": 503,
    "EngineError": 503,
    "BadExpert": 500,
    "InternalError": 500,
    "ClusterError": 500,
}


@every_class
def test_statuses_are_sane(cls: type[MoesaicError]) -> None:
    if issubclass(cls, BadInput):
        assert 400 <= cls.http_status < 500, "the caller's mistake"
        assert cls.http_status not in (408, 429), "not one that goes away by itself"
    else:
        assert cls.http_status == 429 or 500 <= cls.http_status < 600
    # Clients (and the openai package) retry by status; both must say the same.
    assert cls.retryable == (cls.http_status in (429, 503, 504))
    if issubclass(cls, Retryable):
        assert cls.retryable
    if cls.__name__ in STATUS:
        assert cls.http_status == STATUS[cls.__name__]
