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


def test_a_closed_attempt_takes_no_more_parts() -> None:
    contributions, attempt, part = Contributions(), Attempt(1, 0, 0), Part(LAYER, 0, 0, 0)
    contributions.begin(attempt)
    assert contributions.admit(attempt, part)
    for _ in range(2):
        contributions.close(attempt)
        assert not contributions.begin(attempt)  # it was begun, and stays closed
        for refused in (part, part._replace(number=1)):
            with pytest.raises(NotHere, match="takes no more gradients"):
                contributions.admit(attempt, refused)
    again = attempt._replace(number=1)
    with pytest.raises(NotHere):
        contributions.close(again)
    contributions.begin(again)
    assert contributions.admit(again, part)
    contributions.forget()
    with pytest.raises(NotHere, match="takes no more gradients"):
        contributions.check(again)
    with pytest.raises(Superseded):
        contributions.begin(attempt)
    assert contributions.begin(again)  # its host came back to the run
    assert contributions.admit(again, part)


def test_what_was_not_added_up_as_a_whole_is_not_used() -> None:
    contributions, attempt = Contributions(), Attempt(1, 0, 0)
    contributions.begin(attempt)
    contributions.close(attempt)
    contributions.break_off("no memory")
    with pytest.raises(InternalError, match="no memory"):
        contributions.close(attempt)
    again = attempt._replace(number=1)
    contributions.begin(again)
    contributions.close(again)
    with pytest.raises(NotHere):
        contributions.close(attempt)
