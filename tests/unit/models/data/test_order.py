"""The order of sequences: every epoch has each once, and any step can be asked for."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.models.data.order import Order
from moesaic.proto.errors import BadInput
from tests.helpers.paths import ROOT

SIZES = st.integers(1, 30)


@given(SIZES, SIZES, st.integers(-5, 2**64))
def test_every_epoch_is_a_permutation(sequences: int, per_step: int, seed: int) -> None:
    order = Order(sequences, per_step, seed)
    steps = 3 * sequences // per_step + 1
    walked = [number for step in range(steps) for number in order.numbers(step)]
    for epoch in range(3):
        part = walked[epoch * sequences : (epoch + 1) * sequences]
        assert sorted(part) == list(range(sequences))


@given(SIZES, SIZES, st.lists(st.integers(0, 40), min_size=1))
def test_any_step_is_the_same_as_in_a_walk(sequences: int, per_step: int, steps: list[int]) -> None:
    walked = [Order(sequences, per_step, 7).numbers(step) for step in range(41)]
    order = Order(sequences, per_step, 7)
    for step in steps:
        assert order.numbers(step) == walked[step]
        assert len(order._permutations) <= 2


# Two epochs of five sequences, and a part of the third.
PINNED = [[3, 0, 4, 2], [1, 4, 3, 0], [1, 2, 2, 1]]


def test_the_order_stays_what_it_is() -> None:
    order = Order(5, 4, 1)
    assert [order.numbers(step) for step in range(3)] == PINNED
    assert Order(10**6, 4, 1).numbers(1) == [497316, 563630, 736736, 987738]


def test_another_process_has_the_same_order() -> None:
    program = (
        "from moesaic.models.data.order import Order\n"
        "order = Order(5, 4, 1)\n"
        "print([order.numbers(step) for step in (2, 0, 1)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == f"{[PINNED[2], PINNED[0], PINNED[1]]}\n", done.stderr


def test_epochs_and_seeds_differ() -> None:
    orders = [
        tuple(Order(50, 50, seed).numbers(epoch))
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len(set(orders)) == 4


def test_epochs_are_counted_in_parts() -> None:
    order = Order(8, 2, 0)
    assert [order.epoch(step) for step in islice(range(0, 100, 3), 4)] == [0, 0.75, 1.5, 2.25]


def test_what_makes_no_order_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^sequences: has to be at least 1, not 0"):
        Order(0, 1, 0)
    with pytest.raises(BadInput, match=r"^per_step: has to be at least 1, not -1"):
        Order(1, -1, 0)
    with pytest.raises(BadInput, match=r"^step: has to be at least 0, not -1"):
        Order(1, 1, 0).numbers(-1)
