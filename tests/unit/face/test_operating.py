"""Waiting for operations: what `Cluster` inherits, over a controller that answers by the book."""

from __future__ import annotations

from typing import Any

import pytest

from moesaic import operating
from moesaic.operating import Operating
from moesaic.proto.errors import ClusterError


class Scripted(Operating):
    """Answers each question with the next of its answers, the last one for ever."""

    def __init__(self, **answers: list[Any]) -> None:
        self._answers = answers
        self.asked: list[str] = []

    def _join(self) -> str:
        return "nowhere"

    def _ask(self, method: str, *arguments: Any) -> Any:
        self.asked.append(method)
        left = self._answers[method]
        return left.pop(0) if len(left) > 1 else left[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating, "LOOK_S", 0.0)


def change(phase: str, pending: int) -> dict[str, Any]:
    return {"id": 7, "phase": phase, "pending": pending}


def test_a_change_is_waited_for_and_shown_until_it_ends() -> None:
    pool = Scripted(change=[change("loading", 2), change("loading", 1), change("failed", 0)])
    shown: list[int] = []
    done = pool.wait_for({"id": 7}, watch=lambda seen: shown.append(seen["pending"]))
    assert done["phase"] == "failed"
    assert shown == [2, 1]


def test_a_change_that_takes_too_long_is_named_and_goes_on() -> None:
    pool = Scripted(change=[change("loading", 3)])
    with pytest.raises(ClusterError, match="change 7: 3 replicas are still to come after 0 s"):
        pool.wait_for({"id": 7}, 0.0)


def scaling(under_way: bool) -> dict[str, Any]:
    return {"id": 4, "under_way": under_way, "phase": "starting", "waits_for": ["host-2"]}


def test_scaling_is_asked_for_once_and_looked_at_until_it_ends() -> None:
    pool = Scripted(scale=[scaling(True)], scaling=[scaling(True), scaling(False)])
    assert not pool.scale(3)["under_way"]
    assert pool.asked == ["scale", "scaling", "scaling"]


def test_scaling_that_takes_too_long_says_what_it_waits_for() -> None:
    pool = Scripted(scale=[scaling(True)], scaling=[scaling(True)])
    with pytest.raises(ClusterError, match="scaling 4: starting, waits for host-2 after 0 s"):
        pool.scale(3, timeout_s=0.0)
