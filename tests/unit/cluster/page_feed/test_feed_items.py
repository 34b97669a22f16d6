"""Items with revisions: whoever applies the changes has what the store has, whenever it asks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.page_feed import items as items_module
from moesaic.cluster.page_feed.encoding import BEAT, END, decoded, event_of
from moesaic.cluster.page_feed.items import (
    FeedRevision,
    ItemStore,
    applied,
    same_value,
)

NAMES = st.sampled_from(["load:0:m", "load:1:m", "host:h", "own:x", "names"])
ARRAYS = st.sampled_from([np.uint8, np.uint16, np.uint32]).flatmap(
    lambda kind: st.lists(st.integers(0, np.iinfo(kind).max), max_size=9).map(
        lambda values: np.array(values, dtype=kind)
    )
)
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=5))
VALUES = st.one_of(PLAIN, ARRAYS, st.fixed_dictionaries({"counts": ARRAYS, "why": PLAIN}))
ROUNDS = st.lists(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), NAMES, VALUES),
            st.tuples(st.just("remove"), NAMES, st.none()),
            st.tuples(
                st.just("group"), st.just("load:"), st.dictionaries(NAMES, VALUES, max_size=2)
            ),
        ),
        max_size=5,
    ),
    max_size=8,
)


def play(store: ItemStore, steps: list[tuple[str, str, Any]]) -> None:
    for what, name, value in steps:
        if what == "put":
            store.put(name, value)
        elif what == "remove":
            store.remove(name)
        else:
            store.put_group(name, value)
    store.commit()


def read(event: bytes) -> tuple[str, Any]:
    """What a browser makes of an event."""
    kind, data, *rest = event.decode().split("\n")
    assert rest == ["", ""], "one line of data, and an empty one"
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@given(ROUNDS, st.integers(0, 8))
def test_changes_make_the_items_of_any_revision_those_of_now(
    rounds: list[list[tuple[str, str, Any]]], stays_away: int
) -> None:
    store = ItemStore(term=3)
    copy, known = {}, None
    late, late_known = {}, None
    for number, steps in enumerate(rounds):
        play(store, steps)
        changes = store.since(known)
        copy, known = applied(copy, changes), changes.revision
        assert same_value(copy, store.values)
        if number == stays_away or late_known is None:
            late, late_known = dict(copy), known
    changes = store.since(late_known)
    assert same_value(applied(late, changes), store.values)
    # What did not change is not sent.
    assert changes.since == late_known
    assert store.since(store.revision).empty
    assert not store.since(store.revision).values


@given(ROUNDS)
def test_a_browser_that_reads_events_has_the_items(
    rounds: list[list[tuple[str, str, Any]]],
) -> None:
    store, copy, known = ItemStore(term=3), {}, None
    for steps in rounds:
        play(store, steps)
        kind, told = read(event_of(store.since(known)))
        assert kind == ("snapshot" if known is None else "delta")
        if kind == "snapshot":
            copy = {}
        else:
            assert told["from"] == list(known or ())
            for name in told["removed"]:
                copy.pop(name, None)  # it may have come and gone in between
        copy |= {name: decoded(value) for name, value in told["items"].items()}
        known = FeedRevision(*told["to"])
        assert same_value(copy, store.values)


def test_a_value_that_stays_is_no_change() -> None:
    store = ItemStore(term=1)
    store.put("a", {"x": np.array([1, 2], dtype=np.uint8)})
    assert store.commit()
    store.put("a", {"x": np.array([1, 2], dtype=np.uint8)})
    store.put_group("load:", {})
    store.remove("b")
    assert not store.commit()
    assert store.revision == (1, 1)
    # Another type is another value: a browser reads the bytes.
    store.put("a", {"x": np.array([1, 2], dtype=np.uint16)})
    assert store.commit()


@pytest.mark.parametrize("known", [FeedRevision(2, 1), FeedRevision(1, 9), None])
def test_a_revision_of_no_use_gets_everything(known: FeedRevision | None) -> None:
    store = ItemStore(term=1)
    store.put("a", 1)
    store.commit()
    found = store.since(known)
    assert (found.since, dict(found.values)) == (None, {"a": 1})


def test_removals_are_forgotten_and_then_a_late_one_gets_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(items_module, "_REMEMBERED", 2)
    store = ItemStore(term=1)
    for name in "abcd":
        store.put(name, 1)
    store.commit()
    known = store.revision
    for name in "abc":
        store.remove(name)
        store.commit()
    assert store.since(known).since is None
    assert store.since(FeedRevision(1, 2)).removed == ("b", "c")


def test_events_without_data_and_values_that_json_lacks() -> None:
    assert [read(event) for event in (BEAT, END)] == [("beat", {}), ("end", {})]
    store = ItemStore(term=1)
    store.put("a", np.array([1.5]))
    store.commit()
    with pytest.raises(TypeError, match="no ndarray"):
        event_of(store.since(None))
    store.put("a", float("nan"))
    store.commit()
    with pytest.raises(ValueError, match="JSON"):
        event_of(store.since(None))
