"""Orders that a host does not carry out: those of old controllers, and those that were given up."""

from __future__ import annotations

import pytest

from moesaic.cluster.host.fence import Fence
from moesaic.proto.errors import Expired, Superseded


def test_a_report_to_a_newer_controller_ends_the_older_one() -> None:
    fence = Fence()
    fence.obey(3)
    fence.look(4, 0)
    for order in (lambda: fence.obey(3), lambda: fence.look(3, 9), lambda: fence.evict(3, 9)):
        with pytest.raises(Superseded, match=r"term: 3 has ended; .* controller of term 4"):
            order()
    fence.obey(4)


def test_an_eviction_that_was_given_up_is_void_behind_the_next_report() -> None:
    fence = Fence()
    fence.evict(1, 1)
    fence.look(1, 1)
    with pytest.raises(Expired, match="eviction 1"):
        fence.evict(1, 1)
    fence.evict(1, 2)


def test_a_new_controller_counts_from_the_beginning() -> None:
    fence = Fence()
    fence.look(1, 7)
    fence.evict(2, 1)
    assert fence.term == 2
