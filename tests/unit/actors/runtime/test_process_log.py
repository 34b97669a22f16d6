"""A process's logging: what is written by default, what is left out, and what nothing costs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from moesaic.actors.engine.step_log import log_step
from moesaic.actors.router.call_log import CallLog
from moesaic.actors.runtime.log_settings import LogSettings
from moesaic.actors.runtime.process_log import (
    MOST_LINES,
    WINDOW_S,
    Seldom,
    begin_process,
    end_logging,
    rename_log,
    set_up_logging,
)
from moesaic.proto.errors import SpecError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def not_set_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MOESAIC_LOG", "MOESAIC_LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    yield
    end_logging()


def written(capsys: Capture) -> list[str]:
    ours = logging.getLogger("moesaic.actors.router.x")
    for logger, level in ((ours, "ours"), (logging.getLogger("library"), "library")):
        logger.debug("%s-debug", level)
        logger.info("%s-info", level)
        logger.warning("%s-warning", level)
    return [line.rpartition(": ")[2] for line in capsys.readouterr().err.splitlines()]


def test_our_events_and_the_warnings_of_libraries(capsys: Capture) -> None:
    set_up_logging("host-0")
    assert written(capsys) == ["ours-info", "ours-warning", "library-warning"]


def test_a_command_logs_warnings(capsys: Capture) -> None:
    set_up_logging("command", default=logging.WARNING)
    assert written(capsys) == ["ours-warning", "library-warning"]


def test_a_room_has_its_own_level(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_LOG", "error,router=debug")
    set_up_logging("host-0")
    logging.getLogger("moesaic.actors.host.x").warning("not this")
    assert written(capsys) == ["ours-debug", "ours-info", "ours-warning", "library-warning"]


def test_setting_up_twice_writes_once_and_the_end_undoes_it(capsys: Capture) -> None:
    before = list(logging.getLogger().handlers)
    set_up_logging("a", settings=LogSettings(rooms={"actors.router": logging.DEBUG}))
    set_up_logging("b")
    assert written(capsys) == ["ours-info", "ours-warning", "library-warning"]
    end_logging()
    assert logging.getLogger().handlers == before
    for name in ("moesaic", "moesaic.actors.router"):
        assert logging.getLogger(name).level == logging.NOTSET


def test_a_users_own_process_keeps_its_logging() -> None:
    before = list(logging.getLogger().handlers)
    rename_log("owner", default=logging.INFO)
    assert logging.getLogger().handlers == before
    assert logging.getLogger("moesaic").handlers == []


def test_a_wrong_value_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(logging.getLogger().handlers)
    monkeypatch.setenv("MOESAIC_LOG", "loud")
    with pytest.raises(SpecError, match="MOESAIC_LOG: 'loud'"):
        set_up_logging("host-0")
    assert logging.getLogger().handlers == before


def test_a_process_of_a_cluster_says_what_it_is(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESAIC_LOG_FORMAT", "json")
    begin_process("trunk", "m", "local", "trunk-m-x1")
    printed = capsys.readouterr()
    assert printed.out == "moesaic: trunk m of local\n"
    (line,) = map(json.loads, printed.err.splitlines())
    assert line["message"] == "trunk-m-x1 of cluster local has started"
    assert (line["process"], line["cluster"]) == ("trunk-m-x1", "local")
    assert line["version"]


# ---- what repeats for ever -----------------------------------------------------------------------


def test_a_line_that_repeats_for_ever_is_written_seldom() -> None:
    now = 0.0
    seldom = Seldom(lambda: now)

    def passes(level: int = logging.WARNING, line: int = 1) -> logging.LogRecord | None:
        record = logging.LogRecord("moesaic.x", level, "file.py", line, "again", (), None)
        return record if seldom.filter(record) else None

    first = [passes() for _ in range(MOST_LINES + 7)]
    assert all(first[:MOST_LINES])
    assert not any(first[MOST_LINES:])
    last = first[MOST_LINES - 1]
    assert last is not None
    assert vars(last)["then_silent_s"] == WINDOW_S
    assert passes(line=2), "another place is not meant"
    assert all(passes(logging.DEBUG) for _ in range(2 * MOST_LINES)), "debug was asked for"
    now = WINDOW_S
    again = passes()
    assert again is not None
    assert vars(again)["left_out"] == 7
    later = passes()
    assert later is not None
    assert "left_out" not in vars(later)


# ---- what nothing costs --------------------------------------------------------------------------


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_a_step_names_its_requests_only_if_that_is_wanted(
    level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level, logger="moesaic")
    asked = 0

    def requests() -> list[str]:
        nonlocal asked
        asked += 1
        return ["a-0#7", "b#1-0#8", "a-0#9"]

    log_step("r", 3, requests)
    wanted = level == logging.DEBUG
    assert asked == wanted
    assert CallLog("r").on == wanted
    if wanted:
        (record,) = caplog.records
        found = vars(record)
        assert (found["router"], found["step"], found["requests"]) == ("r", 3, ["a-0", "b#1-0"])
