"""`MOESAIC_LOG` and `MOESAIC_LOG_FORMAT`: what they mean, and what is said of wrong values."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.actors.runtime.log_settings import (
    LEVELS,
    LogSettings,
    log_environment,
    log_runtime_env,
    log_settings,
    rooms,
)
from moesaic.proto.errors import SpecError
from tests.helpers.paths import ROOT


def test_nothing_is_asked_for() -> None:
    assert log_settings({}) == LogSettings()
    assert log_settings({"MOESAIC_LOG": " ", "MOESAIC_LOG_FORMAT": ""}) == LogSettings()


def test_a_level_rooms_and_a_format() -> None:
    found = log_settings(
        {"MOESAIC_LOG": "warning, router=debug,cluster.host=ERROR", "MOESAIC_LOG_FORMAT": "JSON"}
    )
    rooms = {"actors.router": logging.DEBUG, "cluster.host": logging.ERROR}
    assert found == LogSettings(level=logging.WARNING, rooms=rooms, form="json")


def test_a_short_name_means_every_room_of_that_name() -> None:
    found = log_settings({"MOESAIC_LOG": "host=debug"})
    assert found.level is None
    assert found.rooms == {"actors.host": logging.DEBUG, "cluster.host": logging.DEBUG}


def test_a_full_name_means_one_room() -> None:
    """Also where it is the last part of another one."""
    assert log_settings({"MOESAIC_LOG": "models=info"}).rooms == {"models": logging.INFO}


def test_the_rooms_are_the_folders() -> None:
    written = {
        str(file.parent.relative_to(ROOT)).replace("/", ".")
        for top in ("proto", "kernels", "models", "cluster", "actors")
        for file in (ROOT / top).rglob("*.py")
    }
    assert set(rooms()) >= written | {"cli"}
    assert not [name for name in rooms() if "__pycache__" in name]


named = st.dictionaries(st.sampled_from(rooms()), st.sampled_from(list(LEVELS)), max_size=4)


@given(st.none() | st.sampled_from(list(LEVELS)), named, st.randoms())
def test_what_is_written_is_read(level: str | None, chosen: dict[str, str], random: object) -> None:
    parts = [f"{room}={word}" for room, word in chosen.items()]
    parts += [] if level is None else [level]
    random.shuffle(parts)  # type: ignore[attr-defined]
    found = log_settings({"MOESAIC_LOG": ",".join(parts)})
    assert found.level == (None if level is None else LEVELS[level])
    assert found.rooms == {room: LEVELS[word] for room, word in chosen.items()}


@given(st.text(max_size=30))
def test_any_text_is_understood_or_refused_by_name(text: str) -> None:
    try:
        found = log_settings({"MOESAIC_LOG": text})
    except SpecError as error:
        assert str(error).startswith("MOESAIC_LOG: ")
        assert "info,router=debug,host=warning" in str(error)
    else:
        assert (found.level is None and not found.rooms) == (not text.strip())


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("MOESAIC_LOG", "loud", "'loud' is not a level"),
        ("MOESAIC_LOG", "info,rooter=debug", "'rooter' is not a room"),
        ("MOESAIC_LOG", "router=", "'' is not a level"),
        ("MOESAIC_LOG", "=debug", "'' is not a room"),
        ("MOESAIC_LOG", "info,debug", "the level of all rooms twice"),
        ("MOESAIC_LOG", "router=info,actors.router=debug", "names the room actors.router twice"),
        ("MOESAIC_LOG_FORMAT", "xml", "'xml' is unknown; write text or json"),
    ],
)
def test_what_is_said_of_a_wrong_value(variable: str, value: str, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        log_settings({variable: value})
    assert str(caught.value).startswith(f"{variable}: ")


def test_processes_of_a_joined_ray_get_these_variables_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environ = {"MOESAIC_LOG": "debug", "MOESAIC_ROUTER_KEY": "k", "MOESAIC_LOG_FORMAT": ""}
    assert log_environment(environ) == {"MOESAIC_LOG": "debug"}
    for name in ("MOESAIC_LOG", "MOESAIC_LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    assert log_runtime_env() == {}
    monkeypatch.setenv("MOESAIC_LOG_FORMAT", "json")
    assert log_runtime_env() == {"runtime_env": {"env_vars": {"MOESAIC_LOG_FORMAT": "json"}}}
