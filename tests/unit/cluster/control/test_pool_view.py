"""What is known of a pool's hosts by their reports."""

from __future__ import annotations

from moesaic.cluster.control.pool_view import Observation, PoolView
from moesaic.cluster.expert_keys import FIRST_VERSION, LayerKey
from moesaic.cluster.planner.plan import PoolHost
from tests.helpers.cluster.worlds import entry

TIMEOUT_S = 3.0


def test_a_host_is_gone_for_as_long_as_reports_say_so() -> None:
    """A round of reports may take long, and the next process may be there when it ends."""
    view = PoolView([PoolHost(name="h0"), PoolHost(name="h1")], host_timeout_s=TIMEOUT_S)
    held = {LayerKey("m", 0): {4: (FIRST_VERSION,)}}
    view.note({"h0": Observation(entry=entry("h0"), holdings=held, loading=False)}, 0.0)
    for now in (1.0, 2.0, 3.5):
        view.note({"h0": None}, now)
        assert not view.empty("h0")
    view.note({"h0": None}, 4.5)  # asked at 3.5 or later, which is 2.5 s after the first time
    assert not view.empty("h0")
    view.note({}, 6.0)
    assert not view.empty("h0"), "nothing was heard of it since"
    view.note({"h0": None}, 6.5)
    assert view.empty("h0")
