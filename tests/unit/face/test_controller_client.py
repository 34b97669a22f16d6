"""Waiting for what the controller does, over one that answers by the book."""

from __future__ import annotations

from typing import Any

import pytest

from moesaic import controller_client
from moesaic.cluster.reports.placing import ChangePhase, ChangeReport, DrainPhase, DrainReport
from moesaic.cluster.reports.scaling import ScalingPhase, ScalingReport
from moesaic.controller_client import ControllerClient
from moesaic.handle import Cluster
from moesaic.proto.errors import ClusterError
from moesaic.session import ClusterSession
from tests.helpers.cluster.reports import CHANGE, SCALING


class Scripted:
    """Answers each question with the next of its answers, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: list[Any]) -> None:
        self._answers = answers
        self.asked: list[tuple[Any, ...]] = []
        monkeypatch.setattr(controller_client, "LOOK_S", 0.0)
        monkeypatch.setattr(ControllerClient, "ask", lambda _, *asked, **__: self._answer(*asked))
        # It never joins a Ray, so it needs no session.
        self.cluster = Cluster(ClusterSession(name="c", pid=1, started=0.0, ray_address=""))

    def _answer(self, method: str, *arguments: Any) -> Any:
        self.asked.append((method, *arguments))
        left = self._answers[method]
        return left.pop(0) if len(left) > 1 else left[0]


def change(phase: ChangePhase, pending_moves: int) -> ChangeReport:
    return CHANGE.model_copy(update={"phase": phase, "pending_moves": pending_moves})


def test_a_change_is_waited_for_and_shown_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = [(ChangePhase.LOADING, 2), (ChangePhase.LOADING, 1), (ChangePhase.FAILED, 0)]
    asked = Scripted(monkeypatch, change=[change(*one) for one in phases])
    shown: list[int] = []
    done = asked.cluster.wait_for(CHANGE, watch=lambda seen: shown.append(seen.pending_moves))
    assert done.phase == "failed"
    assert shown == [2, 1]
    assert asked.asked == [("change", CHANGE.id)] * 3


def test_a_change_that_takes_too_long_is_named_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Scripted(monkeypatch, change=[change(ChangePhase.LOADING, 3)])
    with pytest.raises(ClusterError, match="change 7: 3 replicas are still to come after 0 s"):
        asked.cluster.wait_for(CHANGE, 0.0)


def ended() -> ScalingReport:
    return SCALING.model_copy(update={"phase": ScalingPhase.DONE, "duration_s": 5.0})


def test_scaling_is_asked_for_once_and_looked_at_until_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Scripted(monkeypatch, scale=[SCALING], scaling=[SCALING, ended()])
    shown: list[ScalingReport] = []
    assert not asked.cluster.scale(3, watch=shown.append).under_way
    assert shown == [SCALING]
    assert [method for method, *_ in asked.asked] == ["scale", "scaling", "scaling"]


def test_scaling_that_takes_too_long_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Scripted(monkeypatch, scale=[SCALING], scaling=[SCALING])
    words = r"scaling 4: it has not ended after 0 s \(starting\), and waits for host-2"
    with pytest.raises(ClusterError, match=words):
        asked.cluster.scale(3, timeout_s=0.0)


def drain(phase: DrainPhase, remaining_replicas: int) -> DrainReport:
    return DrainReport(
        host="host-1", phase=phase, remaining_replicas=remaining_replicas, obstacle=None
    )


@pytest.mark.parametrize("end", [DrainPhase.DONE, DrainPhase.NO_ROOM])
def test_a_drain_is_waited_for_until_the_host_is_empty_or_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch, end: DrainPhase
) -> None:
    seen = [drain(DrainPhase.DRAINING, 2), drain(end, 1)]
    asked = Scripted(monkeypatch, drain=[CHANGE], draining=list(seen))
    shown: list[DrainReport] = []
    assert asked.cluster.drain("host-1", 60.0, watch=shown.append) == seen[1]
    assert shown == seen[:1]


def test_a_drain_that_nobody_waits_for_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Scripted(monkeypatch, drain=[CHANGE], draining=[drain(DrainPhase.DRAINING, 2)])
    assert asked.cluster.drain("host-1").remaining_replicas == 2
    assert [method for method, *_ in asked.asked] == ["drain", "draining"]
