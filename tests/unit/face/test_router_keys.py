"""Where the router service's key comes from, and where it is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import moesaic
from moesaic.clients import router_keys
from moesaic.clients.router_keys import VARIABLE, key_for, take_key
from moesaic.proto.errors import ClusterError, Unauthenticated
from moesaic.session import ClusterSession, find_session, write_session

GIVEN = "given-by-the-user-0123456789"
MADE = "made-by-up-0123456789"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(router_keys, "_taken", None)
    monkeypatch.setattr(ClusterSession, "alive", True)


def announce(router: str | None, key: str | None = MADE, name: str = "x") -> None:
    write_session(
        ClusterSession(
            name=name,
            pid=1,
            started=0.0,
            ray_address="127.0.0.1:6379",
            router=router,
            router_key=key,
        )
    )


def test_a_key_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert take_key() is None
    monkeypatch.setenv(VARIABLE, GIVEN)
    assert take_key() == GIVEN
    assert VARIABLE not in os.environ
    # Of a cluster elsewhere: this process still knows it.
    assert key_for("10.0.0.1:8001") == GIVEN


@pytest.mark.parametrize("key", ["short", "with a space in it, and long", "größe-0123456789012345"])
def test_keys_that_cannot_be_sent_or_could_be_guessed(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, key)
    with pytest.raises(ClusterError, match=f"{VARIABLE}: a key has 16 to 512") as caught:
        take_key()
    assert key not in str(caught.value)
    assert VARIABLE not in os.environ


def test_up_takes_it_whatever_happens_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, GIVEN)
    with pytest.raises(moesaic.MoesaicError):
        moesaic.up({"no such": "spec"})
    assert VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("listens", "asked", "found"),
    [
        ("127.0.0.1:8001", "127.0.0.1:8001", True),
        ("127.0.0.1:8001", "localhost:8001", True),
        ("0.0.0.0:8001", "127.0.0.1:8001", True),
        ("127.0.0.1:8001", "127.0.0.1:8002", False),
        ("127.0.0.1:8001", "10.0.0.1:8001", False),
        ("10.0.0.1:8001", "10.0.0.1:8001", True),
        ("10.0.0.1:8001", "127.0.0.1:8001", False),
        (None, "127.0.0.1:8001", False),
    ],
)
def test_a_cluster_of_this_machine_is_known_by_its_address(
    listens: str | None, asked: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(None, None, name="another")
    announce(listens)
    if not found:
        with pytest.raises(Unauthenticated, match=f"{VARIABLE} is not set"):
            key_for(asked)
    monkeypatch.setenv(VARIABLE, GIVEN)
    assert key_for(asked) == (MADE if found else GIVEN)


def test_what_a_session_holds_in_secret_shows_in_no_text() -> None:
    announce("127.0.0.1:8001")
    session = find_session("x")
    assert session is not None
    assert session.router_key == MADE
    assert MADE not in f"{session} {session!r}"
