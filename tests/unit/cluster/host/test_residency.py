"""The host's state machine: admission, merging, fairness, eviction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, LayerKey
from moesaic.cluster.host.residency import (
    HostLimits,
    HostPolicy,
    LayerShape,
    QueuedCall,
    Residency,
    split_batch_time,
)
from moesaic.proto.errors import Busy, CallError, Expired, NotHere
from tests.helpers.effort import tries

SHAPE = LayerShape(num_experts=8, hidden_size=16, dtype="float32")
POLICY = HostPolicy(max_rows=8, max_batch_rows=12, max_queue_rows=40)


def host(experts: range = range(8), layers: int = 2, policy: HostPolicy = POLICY) -> Residency:
    residency = Residency(policy, incarnation=7)
    for layer in range(layers):
        for expert in experts:
            residency.hold(ExpertVersion(ExpertKey("m", layer, expert), 1), SHAPE)
    return residency


def call(seq: int, *, router: str = "r", rows: int = 1, **changes: Any) -> QueuedCall:
    ids = np.full((rows, 2), -1, dtype=np.int32)
    ids[:, 0] = seq % 8
    values: dict[str, Any] = {
        "router": router,
        "seq": seq,
        "key": LayerKey("m", 0),
        "rows": rows,
        "hidden": 16,
        "dtype": "float32",
        "exact": False,
        "expires_at": 100.0,
        "incarnation": 7,
        "version": 1,
        "ids": ids,
    }
    return QueuedCall(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"key": LayerKey("other", 0)}, NotHere, "'other'"),
        ({"key": LayerKey("m", 9)}, NotHere, "layer 9"),
        ({"incarnation": 6}, NotHere, "incarnation"),
        ({"version": 2}, NotHere, "it has version 1"),
        ({"hidden": 17}, CallError, "hidden: 17"),
        ({"dtype": "float16"}, CallError, "dtype: float16"),
        ({"rows": 9, "ids": np.zeros((9, 1), np.int32)}, CallError, "rows: 9"),
        ({"ids": np.array([[8]], np.int32)}, CallError, "ids: expert 8"),
        ({"ids": np.array([[-2]], np.int32)}, CallError, "ids: expert -2"),
        ({"expires_at": 0.0}, Expired, "deadline"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_it_is_queued(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    residency = host()
    refusal = residency.admit(replace(call(1), **changes), now=1.0)
    assert isinstance(refusal, error)
    assert words in str(refusal)
    assert residency.queued_rows == 0


def test_the_queue_is_bounded() -> None:
    residency = host()
    for seq in range(5):
        assert residency.admit(call(seq, rows=8), now=0.0) is None
    refusal = residency.admit(call(9), now=0.0)
    assert isinstance(refusal, Busy)
    assert refusal.retryable


def test_calls_of_several_routers_for_one_layer_become_one_computation() -> None:
    residency = host()
    for seq, router in enumerate("abc"):
        residency.admit(call(seq, router=router, rows=2), now=0.0)
    residency.admit(call(9, router="a", key=LayerKey("m", 1)), now=0.0)
    batch, _ = residency.next_batch(0.0)
    assert sorted(c.seq for c in batch) == [0, 1, 2]


def test_a_large_prefill_delays_a_small_call_by_one_batch_at_most() -> None:
    residency = host()
    for seq in range(4):
        residency.admit(call(seq, router="prefill", rows=8), now=0.0)
    first, _ = residency.next_batch(0.0)
    assert {c.router for c in first} == {"prefill"}
    small = call(100, router="decode", key=LayerKey("m", 1))
    residency.admit(small, now=0.0)
    second, _ = residency.next_batch(0.0)
    assert second == [small]


def test_expired_work_is_dropped_before_it_is_computed() -> None:
    residency = host()
    residency.admit(call(1, expires_at=5.0), now=0.0)
    residency.admit(call(2, expires_at=50.0), now=0.0)
    batch, expired = residency.next_batch(6.0)
    assert [c.seq for c in batch] == [2]
    assert [(c.seq, type(e)) for c, e in expired] == [(1, Expired)]


def test_an_evicted_expert_is_refused_queued_or_new() -> None:
    residency = host()
    residency.admit(call(3), now=0.0)
    residency.admit(call(4), now=0.0)
    refused = residency.release([ExpertVersion(ExpertKey("m", 0, 3), 1)])
    assert [(c.seq, type(e)) for c, e in refused] == [(3, NotHere)]
    assert isinstance(residency.admit(call(3), now=0.0), NotHere)
    batch, _ = residency.next_batch(0.0)
    assert [c.seq for c in batch] == [4]


@settings(max_examples=tries(300), deadline=None)
@given(data=st.data())
def test_every_call_ends_exactly_once_and_only_held_experts_are_computed(
    data: st.DataObject,
) -> None:
    residency = host()
    held = {(layer, e) for layer in range(2) for e in range(8)}
    open_calls: dict[tuple[str, int], QueuedCall] = {}
    ended: set[tuple[str, int]] = set()
    now, seq = 0.0, 0

    def end(ended_call: QueuedCall) -> None:
        key = (ended_call.router, ended_call.seq)
        assert key not in ended, "a call ended twice"
        ended.add(key)
        del open_calls[key]

    for _ in range(data.draw(st.integers(1, 60))):
        kind = data.draw(
            st.sampled_from(["admit"] * 4 + ["next"] * 2 + ["cancel", "gone", "evict"])
        )
        now += data.draw(st.floats(0.0, 2.0))
        if kind == "admit":
            seq += 1
            layer, rows = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 8))
            wanted = np.array(
                [[data.draw(st.integers(-1, 7)) for _ in range(2)] for _ in range(rows)], np.int32
            )
            new = call(
                seq,
                router=data.draw(st.sampled_from("ab")),
                rows=rows,
                key=LayerKey("m", layer),
                ids=wanted,
                exact=data.draw(st.booleans()),
                expires_at=now + data.draw(st.floats(0.1, 8.0)),
            )
            open_calls[new.router, new.seq] = new
            if residency.admit(new, now) is not None:
                end(new)
        elif kind == "next":
            batch, expired = residency.next_batch(now)
            for one, _ in expired:
                assert now >= one.expires_at
                end(one)
            if batch:
                assert len({(c.key, c.exact, c.dtype) for c in batch}) == 1
                assert len(batch) == 1 or sum(c.rows for c in batch) <= POLICY.max_batch_rows
            for one in batch:
                assert now < one.expires_at, "expired work was computed"
                for expert in np.unique(one.ids[one.ids >= 0]).tolist():
                    assert (one.key.layer, expert) in held, "an evicted expert was computed"
                end(one)
        elif kind == "cancel" and open_calls:
            key = data.draw(st.sampled_from(sorted(open_calls)))
            residency.cancel(*key)
            end(open_calls[key])
        elif kind == "gone":
            residency.router_gone("a")
            for one in [c for c in open_calls.values() if c.router == "a"]:
                end(one)
        elif kind == "evict":
            victim = (data.draw(st.integers(0, 1)), data.draw(st.integers(0, 7)))
            held.discard(victim)
            for one, _ in residency.release([ExpertVersion(ExpertKey("m", *victim), 1)]):
                end(one)
        assert residency.queued_rows == sum(c.rows for c in open_calls.values())
        assert residency.queued_rows <= POLICY.max_queue_rows


def test_retries_and_hedges_are_declined_before_first_calls() -> None:
    pool = host(policy=HostPolicy(max_rows=4, max_batch_rows=4, max_queue_rows=8))
    assert pool.admit(call(1, rows=4, attempt=1), 0.0) is None, "an empty queue takes anything"
    assert pool.admit(call(2, rows=1), 0.0) is None
    assert isinstance(pool.admit(call(3, rows=1, attempt=1), 0.0), Busy)
    assert pool.admit(call(4, rows=3), 0.0) is None
    assert isinstance(pool.admit(call(5, rows=1), 0.0), Busy)


def test_each_call_of_a_computation_has_its_part_of_the_time() -> None:
    small, large = call(1, rows=1), call(2, router="s", rows=3)
    unused = replace(call(3, router="t"), ids=np.array([[-1, -1]], dtype=np.int32))
    # One choice in each row, and one more for each call.
    assert split_batch_time(600, [small, large]) == [200, 400]
    assert split_batch_time(77, [small]) == [77]
    assert split_batch_time(10, [unused]) == [10]


@given(rows=st.lists(st.integers(1, 50), min_size=1, max_size=9), batch_us=st.integers(0, 10**9))
def test_parts_of_a_computation_are_the_whole(rows: list[int], batch_us: int) -> None:
    batch = [call(seq, router=f"r{seq}", rows=count) for seq, count in enumerate(rows)]
    parts = split_batch_time(batch_us, batch)
    assert sum(parts) == batch_us
    assert min(parts) >= 0


# ---- versions -----------------------------------------------------------------------------------


def test_calls_name_the_version_that_they_want() -> None:
    residency = host()
    new = ExpertVersion(ExpertKey("m", 0, 1), 2)
    mixed = replace(call(1), ids=np.array([[1, 2]], dtype=np.int32), other_versions=((1, 2),))
    refusal = residency.admit(mixed, now=1.0)
    assert isinstance(refusal, NotHere)
    assert "version 2 of expert 1" in str(refusal)
    residency.hold(new, SHAPE)
    assert residency.holdings()[LayerKey("m", 0)][1] == (1, 2)
    assert residency.admit(mixed, now=1.0) is None
    assert residency.admit(replace(call(9), version=1), now=1.0) is None, "both are served"
    assert residency.serves(new)
    refused = residency.release([new])
    assert [queued for queued, _ in refused] == [mixed]
    assert not residency.serves(new)
    assert residency.holdings()[LayerKey("m", 0)][1] == (1,)


def test_calls_of_different_versions_are_not_computed_together() -> None:
    residency = host()
    residency.hold(ExpertVersion(ExpertKey("m", 0, 1), 2), SHAPE)
    old, new = call(1), replace(call(9), version=2)
    assert residency.admit(old, now=1.0) is None
    assert residency.admit(new, now=1.0) is None
    batches = [residency.next_batch(1.0)[0] for _ in range(2)]
    assert sorted(len(batch) for batch in batches) == [1, 1]


def test_a_call_whose_activations_are_kept_is_computed_by_itself() -> None:
    residency = host()
    for one in (call(1), call(2, keeps=True), call(3), call(4, keeps=True)):
        assert residency.admit(one, now=1.0) is None
    batches = [residency.next_batch(1.0)[0] for _ in range(3)]
    assert sorted([one.seq for one in batch] for batch in batches) == [[1, 3], [2], [4]]


@pytest.mark.parametrize(
    ("stated", "cpu", "gpu"),
    [
        ({}, (512, 1024, 16_384), (16_384, 16_384, 131_072)),
        ({"max_rows": 2000}, (2000, 2000, 16_384), (2000, 16_384, 131_072)),
        ({"max_rows": 20_000}, (20_000, 20_000, 20_000), (20_000, 20_000, 131_072)),
        ({"max_batch_rows": 64}, (64, 64, 16_384), (64, 64, 131_072)),
        ({"max_queue_rows": 100}, (100, 100, 100), (100, 100, 100)),
        ({"max_rows": 8, "max_queue_rows": 9}, (8, 9, 9), (8, 9, 9)),
    ],
)
def test_limits_that_are_not_stated_suit_the_device(
    stated: dict[str, Any], cpu: tuple[int, int, int], gpu: tuple[int, int, int]
) -> None:
    for on_gpu, expected in ((False, cpu), (True, gpu)):
        policy = HostLimits(**stated).policy(gpu=on_gpu)
        assert (policy.max_rows, policy.max_batch_rows, policy.max_queue_rows) == expected
