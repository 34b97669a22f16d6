"""A budget that many share: it is never overdrawn, and all of it comes back."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.actors.transport.budget import Share, SharedLimit
from moesaic.proto.errors import Busy

MOST = 100
STEPS = st.lists(
    st.tuples(
        st.integers(0, 3), st.sampled_from(["take", "give back", "close"]), st.integers(0, 150)
    ),
    max_size=60,
)


@given(STEPS)
def test_it_is_never_overdrawn_and_all_of_it_comes_back(
    steps: list[tuple[int, str, int]],
) -> None:
    budget = SharedLimit(MOST, "bytes")
    shares = [budget.share() for _ in range(4)]
    alone: Share | None = None
    for who, what, size in steps:
        share, before = shares[who], budget.held
        match what:
            case "take":
                try:
                    share.take(size)
                except Busy:
                    assert before > 0
                    assert before + size > MOST
                    assert budget.held == before
                else:
                    if not before and size > MOST:
                        alone = share
            case "give back":
                share.give_back(size)
            case _:
                share.close()
                assert share.held == 0
        assert budget.held == sum(each.held for each in shares)
        assert all(each.held >= 0 for each in shares)
        assert budget.held <= MOST or alone is not None
    for share in shares:
        share.close()
        share.close()
        share.take(7)
    assert budget.held == 0


def test_one_that_is_larger_than_the_whole_goes_alone() -> None:
    budget = SharedLimit(MOST, "bytes of weights")
    with budget.holding(1), pytest.raises(Busy, match=r"bytes of weights: 1 of 100 .* 500 more"):
        budget.share().take(500)
    with budget.holding(500), pytest.raises(Busy), budget.holding(1):
        pass
    assert budget.held == 0


def test_many_threads() -> None:
    budget = SharedLimit(MOST, "bytes")
    seen = []

    def use() -> None:
        for size in range(1, 200):
            try:
                with budget.holding(size % 40 + 1):
                    seen.append(budget.held)
            except Busy:
                continue

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.held == 0
    assert max(seen) <= MOST
