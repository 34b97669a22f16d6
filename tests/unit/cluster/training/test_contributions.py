"""What a host adds up of a training step, and when it forgets it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.training.contributions import Attempt, Contributions, Part
from moesaic.proto.errors import InternalError, NotHere, Superseded

LAYER = LayerKey("m", 0)
attempts = st.builds(Attempt, st.integers(1, 2), st.integers(0, 2), st.integers(0, 2))
parts = st.builds(Part, st.just(LAYER), st.integers(0, 1), st.integers(0, 1), st.integers(0, 1))


@given(st.lists(st.one_of(attempts, st.tuples(attempts, parts)), max_size=60))
def test_a_part_counts_once_and_only_in_its_attempt(events: list[Attempt | tuple]) -> None:
    contributions, current = Contributions(), None
    added: set[Part] = set()
    for event in events:
        if isinstance(event, Attempt):
            if current is not None and event < current:
                with pytest.raises(Superseded, match="under way"):
                    contributions.begin(event)
                continue
            assert contributions.begin(event) == (event != current)
            added = added if event == current else set()
            current = event
            continue
        attempt, part = event
        if attempt != current:
            with pytest.raises(NotHere, match=str(attempt)):
                contributions.admit(attempt, part)
            continue
        assert contributions.admit(attempt, part) == (part not in added)
        added.add(part)
    assert contributions.parts == len(added)


def test_what_was_not_added_up_as_a_whole_is_not_used() -> None:
    contributions, attempt = Contributions(), Attempt(1, 0, 0)
    contributions.begin(attempt)
    contributions.check_whole(attempt)
    contributions.break_off("no memory")
    with pytest.raises(InternalError, match="no memory"):
        contributions.check_whole(attempt)
    again = attempt._replace(number=1)
    contributions.begin(again)
    contributions.check_whole(again)
    with pytest.raises(NotHere):
        contributions.check_whole(attempt)
