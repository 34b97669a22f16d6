"""The router service's state machine: merging, turns, room, deadlines, with a clock of its own."""

from __future__ import annotations

from collections import Counter
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moesaic.cluster.batching.batch_queue import (
    Abort,
    Batch,
    BatchQueue,
    BatchSlice,
    CallResult,
    ChangePhase,
    ClientCall,
    MergePolicy,
    fair_shares,
)
from moesaic.cluster.expert_keys import LayerKey
from tests.helpers.effort import tries

LAYER, OTHER = LayerKey("m", 0), LayerKey("m", 1)
NOTHING = np.zeros(0, dtype=np.int64)


class World:
    """A merger, and a router that answers at once."""

    def __init__(self, **policy: float) -> None:
        self.merger = BatchQueue(MergePolicy(**policy))  # pyright: ignore[reportArgumentType]
        self.numbers = count(1)
        self.now = 0.0

    def arrive(
        self,
        client: str,
        *,
        rows: int = 1,
        key: LayerKey = LAYER,
        size: int = 0,
        time_s: float = 100.0,
        ready: bool = True,
    ) -> tuple[int, list[CallResult]]:
        number = next(self.numbers)
        call = ClientCall(
            number=number,
            client=client,
            key=key,
            rows=rows,
            size_bytes=size,
            deadline=self.now + time_s,
        )
        ends = self.merger.arrive(call, self.now)
        if ready:
            self.merger.ready(number)
        return number, ends

    def take(self) -> tuple[list[CallResult | Abort], Batch | None]:
        return self.merger.take(self.now)

    def batch(self) -> Batch:
        over, batch = self.take()
        assert not over
        assert batch is not None
        return batch

    def answer(self, batch: Batch, took_s: float = 0.0) -> list[CallResult]:
        self.now += took_s
        ends = [
            end
            for piece in batch.pieces
            for end in self.merger.computed(piece, NOTHING, "", self.now)
        ]
        self.merger.batch_over(batch, self.now)
        return ends


def rows_of(batch: Batch) -> dict[int, int]:
    return {piece.number: piece.rows_n.size for piece in batch.pieces}


# ---- merging ------------------------------------------------------------------------------------


def test_what_waits_for_one_layer_is_merged() -> None:
    world = World()
    first, _ = world.arrive("a", rows=3)
    second, _ = world.arrive("b", rows=2)
    other, _ = world.arrive("c", key=OTHER)
    third, _ = world.arrive("a", rows=4)
    batch = world.batch()
    assert batch.key == LAYER
    assert rows_of(batch) == {first: 3, third: 4, second: 2}
    assert {end.number for end in world.answer(batch)} == {first, second, third}
    assert rows_of(world.batch()) == {other: 1}
    assert world.merger.stats.merged == 1


def test_nothing_waits_for_more_to_arrive() -> None:
    world = World()
    number, _ = world.arrive("a")
    assert rows_of(world.batch()) == {number: 1}
    assert world.take() == ([], None)


def test_a_call_is_not_computed_before_all_of_it_is_here() -> None:
    world = World()
    number, _ = world.arrive("a", ready=False)
    assert world.take() == ([], None)
    world.merger.ready(number)
    assert rows_of(world.batch()) == {number: 1}


def test_one_mistake_is_one_clients() -> None:
    world = World()
    bad, _ = world.arrive("a")
    good, _ = world.arrive("b")
    pieces = {piece.number: piece for piece in world.batch().pieces}
    assert world.merger.failed(pieces[bad], "BadExpert", "expert 3") == [
        CallResult(bad, "BadExpert", "expert 3")
    ]
    assert world.merger.computed(pieces[good], NOTHING, "", 0.0) == [CallResult(good)]


# ---- turns --------------------------------------------------------------------------------------


def test_a_large_call_goes_in_pieces_and_small_ones_beside_it() -> None:
    world = World(max_batch_rows=10)
    large, _ = world.arrive("a", rows=25)
    small, _ = world.arrive("b", rows=2)
    first = world.batch()
    assert rows_of(first) == {large: 8, small: 2}
    assert world.answer(first) == [CallResult(small)]
    late, _ = world.arrive("c", rows=7)
    second = world.batch()
    # Both want more than half.
    assert rows_of(second) == {large: 5, late: 5}
    world.answer(second)
    last = world.batch()
    assert rows_of(last) == {late: 2, large: 8}
    assert world.answer(last) == [CallResult(late)]
    end = world.batch()
    assert rows_of(end) == {large: 4}
    assert [piece.rows_n.tolist() for piece in end.pieces] == [[21, 22, 23, 24]]
    assert world.answer(end) == [CallResult(large)]


def test_clients_take_turns_whatever_they_ask_for() -> None:
    world = World(max_batch_rows=1)
    for _ in range(5):
        world.arrive("flood", key=LAYER)
    for client in ("b", "c"):
        world.arrive(client, key=OTHER)
    keys = []
    for _ in range(7):
        batch = world.batch()
        keys.append(batch.key)
        world.answer(batch)
    assert keys == [LAYER, OTHER, OTHER, *[LAYER] * 4]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(20, 200))
def test_shares_are_fair(wants: list[int], most: int) -> None:
    shares = fair_shares(wants, most)
    assert sum(shares) == min(most, sum(wants))
    for share, want in zip(shares, wants, strict=True):
        assert 1 <= share <= want
        # Who gets less than it wants has no less than anybody else, but for one row.
        assert share == want or share >= max(shares) - 1


@settings(max_examples=tries(60), deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcd"), st.sampled_from([LAYER, OTHER]), st.sampled_from([1, 3, 40])
        ),
        min_size=2,
        max_size=30,
    )
)
def test_nobody_starves(calls: list[tuple[str, LayerKey, int]]) -> None:
    """Whoever waits has rows in one of any four batches, with four clients."""
    world = World(max_batch_rows=3)
    client_of, waiting = {}, Counter[str]()
    for client, key, rows in calls:
        client_of[world.arrive(client, rows=rows, key=key)[0]] = client
        waiting[client] += 1
    since = dict.fromkeys(waiting, 0)
    while waiting.total():
        batch = world.batch()
        served = {client_of[piece.number] for piece in batch.pieces}
        for client in since:
            since[client] = since[client] + 1 if waiting[client] and client not in served else 0
            assert since[client] < 4
        for end in world.answer(batch):
            waiting[client_of[end.number]] -= 1
    assert world.take() == ([], None)


# ---- room ---------------------------------------------------------------------------------------


def test_the_client_that_holds_most_loses_its_newest_call() -> None:
    world = World(max_calls=3)
    _, second = (world.arrive("flood")[0] for _ in range(2))
    world.arrive("b")
    number, (end,) = world.arrive("c")
    assert (end.number, end.code) == (second, "Busy")
    assert "3 calls" in end.message
    # Equals do not push one another out.
    more, (refused,) = world.arrive("d")
    assert (refused.number, refused.code) == (more, "Busy")
    assert number in rows_of(world.batch())


def test_bytes_are_bounded_and_freed_when_the_answer_has_gone() -> None:
    world = World(max_bytes=100)
    number, ends = world.arrive("a", size=60)
    assert not ends
    large, (end,) = world.arrive("b", size=60)
    assert (end.number, end.code) == (large, "Busy")
    assert world.answer(world.batch()) == [CallResult(number)]
    assert world.merger.held_bytes == 60, "its answer is on its way"
    world.merger.leave(number)
    assert not world.arrive("b", size=60)[1]


def test_what_is_being_computed_is_not_given_up_for_others() -> None:
    world = World(max_calls=2)
    world.arrive("a")
    world.arrive("a")
    batch = world.batch()
    newcomer, (end,) = world.arrive("b")
    assert end.number == newcomer
    assert len(world.answer(batch)) == 2


def test_the_pause_is_about_as_long_as_what_waits() -> None:
    world = World(max_calls=2, max_batch_rows=10)
    world.arrive("a", rows=10)
    assert not world.answer(world.batch(), took_s=0.5)[0].code
    world.arrive("a", rows=30)
    _, (end,) = world.arrive("a")
    assert end.retry_after_s == pytest.approx(1.5)


# ---- time ---------------------------------------------------------------------------------------


def test_what_is_too_late_is_dropped_before_it_is_computed() -> None:
    world = World()
    late, _ = world.arrive("a", time_s=1.0)
    good, _ = world.arrive("b", time_s=5.0)
    assert world.merger.wake_at(world.now) == 1.0
    world.now = 1.0
    over, batch = world.take()
    assert over == [CallResult(late, "Expired", "the call's deadline passed before its turn")]
    assert batch is not None
    assert rows_of(batch) == {good: 1}


def test_who_never_sends_and_who_never_takes_is_cut_once() -> None:
    world = World()
    taking, _ = world.arrive("b", time_s=1.0)
    world.answer(world.batch())
    sending, _ = world.arrive("a", time_s=1.0, ready=False)
    world.now = 1.0
    assert world.take() == ([Abort(taking), Abort(sending)], None)
    assert world.take() == ([], None)
    assert world.merger.wake_at(world.now) == float("inf")
    world.merger.leave(taking)
    world.merger.leave(sending)
    assert world.merger.held_calls == 0


def test_a_client_that_left_takes_no_more_of_the_router() -> None:
    world = World(max_batch_rows=4)
    gone, _ = world.arrive("a", rows=6)
    batch = world.batch()
    world.merger.leave(gone)
    world.merger.leave(gone)
    assert world.answer(batch) == []
    assert world.take() == ([], None)
    assert world.merger.held_calls == 0


# ---- experts that nobody has --------------------------------------------------------------------


def test_rows_that_lack_an_expert_are_tried_again_and_hold_up_nobody() -> None:
    world = World(away_s=0.5)
    number, _ = world.arrive("a", rows=4, time_s=2.0)
    (piece,) = world.batch().pieces
    assert world.merger.computed(piece, np.array([1, 3]), "expert 7", world.now) == []
    assert world.take() == ([], None)
    other, _ = world.arrive("b")
    batch = world.batch()
    assert rows_of(batch) == {other: 1}
    world.answer(batch)
    assert world.merger.wake_at(world.now) == 0.5
    world.now = 0.5
    (again,) = world.batch().pieces
    assert again.rows_n.tolist() == [1, 3]
    assert world.merger.computed(again, NOTHING, "", world.now) == [CallResult(number)]


def test_what_lacked_an_expert_until_the_end_says_so() -> None:
    world = World(away_s=0.5)
    number, _ = world.arrive("a", time_s=2.0)
    (piece,) = world.batch().pieces
    assert world.merger.computed(piece, np.array([0]), "expert 7", world.now) == []
    world.now = 2.0  # others were in its way
    assert world.take() == ([CallResult(number, "ExpertUnavailable", "expert 7")], None)


def test_without_time_for_another_try_the_expert_is_named() -> None:
    world = World(away_s=0.5)
    number, _ = world.arrive("a", time_s=0.4)
    (piece,) = world.batch().pieces
    ends = world.merger.computed(piece, np.array([0]), "expert 7", world.now)
    assert ends == [CallResult(number, "ExpertUnavailable", "expert 7")]


# ---- whatever happens ---------------------------------------------------------------------------

POLICY = MergePolicy(max_batch_rows=5, max_calls=6, max_bytes=400, away_s=0.5)


class Anything(RuleBasedStateMachine):
    """Every call ends once; batches have no more rows than they may, each row once."""

    def __init__(self) -> None:
        super().__init__()
        self.merger = BatchQueue(POLICY)
        self.now = 0.0
        self.numbers = count(1)
        self.calls: dict[int, ClientCall] = {}  # that have not ended
        self.done: dict[int, Counter[int]] = {}
        self.batch: Batch | None = None
        self.leaving: set[int] = set()

    def ended(self, over: list[CallResult] | list[CallResult | Abort]) -> None:
        for event in over:
            if isinstance(event, Abort):
                continue
            call = self.calls.pop(event.number)  # fails where a call ends twice
            if not event.code:
                assert self.done[event.number] == Counter(range(call.rows))
                self.leaving.add(event.number)

    @rule(
        client=st.sampled_from("abcd"),
        layer=st.sampled_from([LAYER, OTHER]),
        rows=st.integers(1, 12),
        time_s=st.sampled_from([0.3, 2.0, 50.0]),
        ready=st.booleans(),
    )
    def arrives(self, client: str, layer: LayerKey, rows: int, time_s: float, ready: bool) -> None:
        number = next(self.numbers)
        call = ClientCall(
            number=number,
            client=client,
            key=layer,
            rows=rows,
            size_bytes=10 * rows,
            deadline=self.now + time_s,
        )
        self.calls[number], self.done[number] = call, Counter()
        self.ended(self.merger.arrive(call, self.now))
        if ready:
            self.merger.ready(number)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def the_rest_comes(self, data: st.DataObject) -> None:
        self.merger.ready(data.draw(st.sampled_from(sorted(self.calls))))

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def a_caller_goes(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.calls)))
        self.merger.leave(number)
        del self.calls[number]

    @precondition(lambda self: self.leaving)
    @rule()
    def answers_have_gone(self) -> None:
        for number in self.leaving:
            self.merger.leave(number)
        self.leaving.clear()

    @rule(seconds=st.sampled_from([0.1, 0.4, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.batch is None)
    @rule()
    def the_router_is_free(self) -> None:
        over, self.batch = self.merger.take(self.now)
        self.ended(over)
        assert all(call.deadline > self.now for call in self.calls.values() if call.phase in WAITS)
        if self.batch is None:
            assert not any(call.can_go(self.now) for call in self.calls.values())
            return
        numbers = [piece.number for piece in self.batch.pieces]
        assert len(set(numbers)) == len(numbers)
        assert all(self.calls[number].key == self.batch.key for number in numbers)
        sizes = [piece.rows_n.size for piece in self.batch.pieces]
        assert min(sizes) > 0
        assert sum(sizes) <= POLICY.max_batch_rows

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data())
    def the_router_answers(self, data: st.DataObject) -> None:
        assert self.batch is not None
        for piece in self.batch.pieces:
            fate = data.draw(st.sampled_from(["answered", "answered", "lacking", "failed"]))
            self.ended(self.fate_of(piece, fate))
        self.merger.batch_over(self.batch, self.now)
        self.batch = None

    def fate_of(self, piece: BatchSlice, fate: str) -> list[CallResult]:
        if fate == "failed":
            return self.merger.failed(piece, "BadExpert", "expert 1")
        lacking_n = piece.rows_n[::2] if fate == "lacking" else NOTHING
        self.done[piece.number].update(np.setdiff1d(piece.rows_n, lacking_n).tolist())
        return self.merger.computed(piece, lacking_n, "expert 1", self.now)

    @invariant()
    def what_is_held_is_bounded(self) -> None:
        assert self.merger.held_calls <= POLICY.max_calls
        assert self.merger.held_bytes <= POLICY.max_bytes
        assert self.merger.held_calls == len(self.calls) + len(self.leaving)

    def teardown(self) -> None:
        """What is left ends, too, without anything happening but time."""
        if self.batch is not None:
            for piece in self.batch.pieces:
                self.ended(self.fate_of(piece, "answered"))
        for number in self.calls:
            self.merger.ready(number)
        self.now += 100.0
        self.ended(self.merger.take(self.now)[0])
        assert not self.calls


WAITS = (ChangePhase.WAITING, ChangePhase.COMPUTING)
TestAnything = Anything.TestCase
TestAnything.settings = settings(
    max_examples=tries(150), stateful_step_count=40, deadline=None, derandomize=True
)
