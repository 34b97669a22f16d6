"""Starts of processes, and the objects that Python's garbage collector looks at."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from moesaic.actors.runtime.garbage import starting_without_collections


class Ring:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_a_start_makes_is_not_looked_at_again() -> None:
    with starting_without_collections():
        assert not gc.isenabled()
        stays = [Ring() for _ in range(10)]
    assert gc.isenabled()
    assert not {id(one) for one in stays} & {id(one) for one in gc.get_objects()}


def test_its_garbage_is_collected() -> None:
    with starting_without_collections():
        gone = weakref.ref(Ring())
    assert gone() is None


def test_garbage_of_later_is_collected_as_ever() -> None:
    with starting_without_collections(makes_garbage=False):
        pass
    gone = weakref.ref(Ring())
    gc.collect()
    assert gone() is None


def test_a_start_that_fails_turns_the_collector_on_again() -> None:
    with pytest.raises(ValueError, match="failed"), starting_without_collections():
        raise ValueError("failed")
    assert gc.isenabled()


def test_who_runs_without_the_collector_goes_on_without() -> None:
    gc.disable()
    try:
        with starting_without_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
