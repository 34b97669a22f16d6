"""The memory of cards: a plan without problems fits, and what is said not to fit does not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.card_memory import (
    CONTEXT_BYTES,
    LEAST_WORKSPACE_BYTES,
    OWNED_PARAMETER_BYTES,
    PARTLY_FILLED_BYTES,
    Card,
    CardPlan,
    CardProcess,
    CardShare,
    HostRoom,
    mig_names,
    plan_cards,
)
from moesaic.kernels.training.update_rules import UpdateRule

GB = 10**9
TRUNK_FIXED = CONTEXT_BYTES + LEAST_WORKSPACE_BYTES
FIXED = TRUNK_FIXED + PARTLY_FILLED_BYTES  # of a host


def card(total_gb: float = 100, name: str = "a", free_gb: float | None = None) -> Card:
    return Card(name, int(total_gb * GB), None if free_gb is None else int(free_gb * GB))


def host(
    num_gpus: float = 0.0,
    gpu_memory: float | int | None = None,
    *,
    device: int = 0,
    most: int | None = None,
    key: str = "hosts.0",
    trains: bool = False,
) -> CardProcess:
    share = CardShare(key=key, num_gpus=num_gpus, gpu_memory=gpu_memory, trains=trains)
    return CardProcess(share=share, device=device, holds_experts=True, most_expert_bytes=most)


def trunk(
    weights_gb: float = 1,
    num_gpus: float = 0.0,
    gpu_memory: float | int | None = None,
    *,
    device: int = 0,
) -> CardProcess:
    share = CardShare(key="trunk", num_gpus=num_gpus, gpu_memory=gpu_memory)
    return CardProcess(share=share, device=device, weight_bytes=int(weights_gb * GB))


def said(plan: CardPlan) -> list[tuple[str, str]]:
    return [(problem.severity, problem.key) for problem in plan.problems]


# ---- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "limit", "key"),
    [
        (CardShare(key="hosts.0"), None, "hosts.0.gpu_memory"),
        (CardShare(key="hosts.0", num_gpus=0.25), 25, "hosts.0.num_gpus"),
        (CardShare(key="hosts.0", num_gpus=1), None, "hosts.0.gpu_memory"),
        (CardShare(key="hosts.0", num_gpus=2), None, "hosts.0.gpu_memory"),
        (CardShare(key="trunk", num_gpus=0.25, gpu_memory=0.5), 50, "trunk.gpu_memory"),
        (CardShare(key="trunk", gpu_memory=7), 7, "trunk.gpu_memory"),
        (CardShare(key="trunk", gpu_memory=1.0), 100, "trunk.gpu_memory"),
    ],
)
def test_what_limits_a_process(share: CardShare, limit: int | None, key: str) -> None:
    assert share.limit_bytes(100) == limit
    assert share.limited_by == key


def test_a_hosts_limit_is_divided() -> None:
    room = HostRoom.within(32 * GB)
    assert room.workspace_bytes == 2 * GB
    assert room.mapped_bytes + room.workspace_bytes + CONTEXT_BYTES == 32 * GB
    assert room.mapped_bytes - room.expert_bytes == PARTLY_FILLED_BYTES
    assert HostRoom.within(FIXED).expert_bytes == 0
    assert HostRoom.within(FIXED + 1).expert_bytes == 1


# ---- one card -----------------------------------------------------------------------------------


def test_a_trunk_and_two_hosts_in_parts_of_a_card() -> None:
    parts = [host(0.3), host(0.3), trunk(5, 0.3)]
    plan = plan_cards([card()], parts, expert_bytes=40 * GB)
    assert plan.problems == []
    (planned,) = plan.cards
    assert [one.expert_bytes for one in planned.processes] == [20 * GB, 20 * GB, 0]
    assert planned.planned_bytes == 90 * GB
    assert planned.needed_bytes == 45 * GB + 2 * FIXED + TRUNK_FIXED


def test_experts_beyond_the_parts_name_the_key() -> None:
    plan = plan_cards([card()], [host(0.3), host(0.3), trunk(5, 0.3)], expert_bytes=56 * GB)
    assert said(plan) == [("error", "hosts.0.num_gpus")]
    room = 2 * HostRoom.within(30 * GB).expert_bytes
    message = plan.problems[0].message
    assert message.startswith("experts need 56.0 GB, but ")
    assert f"(hosts.0.num_gpus) have room for {room / 1e9:.1f} GB" in message
    limited = [host(0.3, 20 * GB), host(0.3, 20 * GB), trunk(5, 0.3)]
    assert said(plan_cards([card()], limited, expert_bytes=40 * GB)) == [
        ("error", "hosts.0.gpu_memory")
    ]


def test_hosts_without_a_limit_share_what_is_left() -> None:
    parts = [host(), host(), trunk(20)]
    plan = plan_cards([card()], parts, expert_bytes=70 * GB)
    assert plan.problems == []
    assert plan.cards[0].planned_bytes == 90 * GB + 2 * FIXED + TRUNK_FIXED
    assert said(plan_cards([card()], parts, expert_bytes=80 * GB + 1)) == [
        ("error", "hosts.0.gpu_memory")
    ]
    # It fits without contexts, which are an estimate.
    assert said(plan_cards([card()], parts, expert_bytes=80 * GB)) == [
        ("warning", "hosts.0.gpu_memory")
    ]


def test_slots_leave_room_for_other_hosts() -> None:
    parts = [host(most=10 * GB), host()]
    plan = plan_cards([card()], parts, expert_bytes=80 * GB)
    assert [one.expert_bytes for one in plan.cards[0].processes] == [10 * GB, 70 * GB]
    assert plan.problems == []


def test_hosts_on_the_cpu_hold_the_rest() -> None:
    assert not plan_cards([card(10)], [host()], expert_bytes=20 * GB).fits
    with_cpu = plan_cards([card(10)], [host()], expert_bytes=20 * GB, cpu_hosts=[None])
    assert with_cpu.problems == []
    short = plan_cards([card(10)], [host()], expert_bytes=20 * GB, cpu_hosts=[5 * GB, 4 * GB])
    assert not short.fits


def test_a_trunk_beyond_its_limit() -> None:
    assert said(plan_cards([card()], [trunk(11, gpu_memory=0.1)], expert_bytes=0)) == [
        ("error", "trunk.gpu_memory")
    ]
    assert said(plan_cards([card()], [trunk(11, 0.1)], expert_bytes=0)) == [
        ("error", "trunk.num_gpus")
    ]
    assert said(plan_cards([card()], [trunk(9.9, gpu_memory=0.1)], expert_bytes=0)) == [
        ("warning", "trunk.gpu_memory")
    ]
    assert said(plan_cards([card()], [trunk(101)], expert_bytes=0)) == [
        ("error", "trunk.gpu_memory")
    ]
    assert said(plan_cards([card()], [trunk(99.9)], expert_bytes=0)) == [
        ("warning", "trunk.gpu_memory")
    ]


def test_limits_that_exceed_the_card() -> None:
    twice = [host(gpu_memory=0.6), host(gpu_memory=0.6)]
    plan = plan_cards([card()], twice, expert_bytes=0)
    assert said(plan) == [("error", "hosts.0.gpu_memory")]
    assert "the limits of the processes on one card (hosts.0.gpu_memory) are 120.0 GB" in (
        plan.problems[0].message
    )
    large = plan_cards([card()], [host(gpu_memory=200 * GB)], expert_bytes=0)
    assert said(large) == [("error", "hosts.0.gpu_memory")]
    assert "200.0 GB, but the card has 100.0 GB" in large.problems[0].message
    beside = [host(gpu_memory=0.6), trunk(41)]
    assert said(plan_cards([card()], beside, expert_bytes=0)) == [("error", "hosts.0.gpu_memory")]
    assert said(plan_cards([card()], [host(gpu_memory=FIXED)], expert_bytes=0)) == [
        ("error", "hosts.0.gpu_memory")
    ]


def test_a_second_version_of_all_experts_is_a_warning() -> None:
    for second, wanted in ((30 * GB, []), (60 * GB, [("warning", "models")])):
        plan = plan_cards([card()], [host()], expert_bytes=60 * GB, second_bytes=second)
        assert said(plan) == wanted


def test_other_programs_on_the_card_are_a_warning() -> None:
    for free, wanted in ((99, []), (50, [("warning", "hosts")]), (None, [])):
        plan = plan_cards([card(free_gb=free)], [host()], expert_bytes=60 * GB)
        assert said(plan) == wanted


def test_rows_beyond_the_workspace_are_a_warning() -> None:
    share = CardShare(key="hosts.0", gpu_memory=0.1)
    wide = CardProcess(share=share, holds_experts=True, workspace_bytes=GB)
    assert said(plan_cards([card()], [wide], expert_bytes=0)) == [("warning", "hosts.0.gpu_memory")]


# ---- several cards ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "places"),
    [
        ([host(0.5), host(0.5), trunk(1, 0.5)], [[0, 1], [2]]),
        ([host(1), trunk(1, 1)], [[0], [1]]),
        ([host(0.3), host(0.6), trunk(1, 0.4)], [[0, 1], [2]]),
        ([host(0.5), host(0.6), trunk(1, 0.3)], [[0], [1, 2]]),  # the least left over
        ([host(2)], [[0], []]),
        ([host(device=1), trunk(1, device=0)], [[1], [0]]),
    ],
)
def test_where_ray_puts_processes(processes: list[CardProcess], places: list[list[int]]) -> None:
    named = [
        CardProcess(
            share=CardShare(key=str(n), num_gpus=one.share.num_gpus),
            device=one.device,
            holds_experts=one.holds_experts,
        )
        for n, one in enumerate(processes)
    ]
    plan = plan_cards([card(name="a"), card(name="b")], named, expert_bytes=0)
    assert [[int(p.key) for p in one.processes] for one in plan.cards] == places
    assert plan.problems == []


@pytest.mark.parametrize("wanted", [[host(0.6)] * 3, [host(1.5)], [host(1), host(0.1), host(1)]])
def test_gpus_that_ray_cannot_reserve(wanted: list[CardProcess]) -> None:
    plan = plan_cards([card(name="a"), card(name="b")], wanted, expert_bytes=0)
    assert said(plan) == [("error", "hosts.0.num_gpus")]


def test_no_cards_and_a_card_that_is_not_there() -> None:
    assert plan_cards([], [], expert_bytes=GB).cards == []
    # Another check says that there is no such device.
    assert plan_cards([card()], [host(device=1)], expert_bytes=0).problems == []


# ---- any plan -----------------------------------------------------------------------------------

SHARES = st.tuples(
    st.sampled_from([0.0, 0.2, 0.3, 0.5, 1.0, 2.0]),
    st.none() | st.sampled_from([0.1, 0.4, 1.0]) | st.integers(1, 120).map(lambda n: n * GB),
)
HOSTS = st.builds(
    lambda share, device, most: host(*share, device=device, most=most),
    SHARES,
    st.integers(0, 2),
    st.none() | st.integers(0, 50).map(lambda n: n * GB),
)
TRUNKS = st.builds(
    lambda weights, share, device: trunk(weights, *share, device=device),
    st.integers(0, 60),
    SHARES,
    st.integers(0, 2),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    cards=st.lists(st.integers(10, 120), min_size=1, max_size=3),
    processes=st.lists(HOSTS | TRUNKS, max_size=5),
    experts=st.integers(0, 200),
)
def test_a_plan_without_an_error_never_exceeds_a_card(
    cards: list[int], processes: list[CardProcess], experts: int
) -> None:
    there = [card(total, name=str(n)) for n, total in enumerate(cards)]
    plan = plan_cards(there, processes, expert_bytes=experts * GB)
    if not plan.fits:
        return
    placed = [one for planned in plan.cards for one in planned.processes]
    for planned in plan.cards:
        total = planned.card.total_bytes
        assert sum(p.limit_bytes or 0 for p in planned.processes) <= total
        for process in planned.processes:
            if process.limit_bytes is not None and process.key != "trunk":
                assert process.expert_bytes + FIXED <= process.limit_bytes
        if not plan.problems:
            assert planned.planned_bytes <= total
    if not plan.problems and any(one.key != "trunk" for one in placed):
        assert sum(one.expert_bytes for one in placed) == experts * GB, "every expert has a place"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    total=st.integers(10, 120),
    limits=st.lists(st.none() | st.integers(1, 60), min_size=1, max_size=4),
    weights=st.integers(0, 60),
    experts=st.integers(0, 150),
)
def test_what_is_called_too_much_is_too_much(
    total: int, limits: list[int | None], weights: int, experts: int
) -> None:
    """On one card, counted without any estimate: an error names what cannot be there."""
    hosts = [host(gpu_memory=None if one is None else one * GB) for one in limits]
    plan = plan_cards([card(total)], [*hosts, trunk(weights)], expert_bytes=experts * GB)
    given_out = sum(one for one in limits if one is not None)
    rooms = [0 if one is None else HostRoom.within(one * GB).expert_bytes for one in limits]
    left = (total - given_out - weights) * GB
    room = sum(rooms) + (max(0, left) if None in limits else 0)
    too_small = any(one is not None and r == 0 for one, r in zip(limits, rooms, strict=True))
    wrong = left < 0 or too_small or experts * GB > room
    assert wrong == (not plan.fits)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, []),
        ("", []),
        ("0,1", []),
        ("GPU-5d1c,GPU-77aa", []),
        ("MIG-5d1c", ["MIG-5d1c"]),
        ("MIG-5d1c, MIG-GPU-77aa/1/0", ["MIG-5d1c", "MIG-GPU-77aa/1/0"]),
    ],
)
def test_mig_instances_in_what_is_visible(visible: str | None, names: list[str]) -> None:
    assert mig_names(visible) == names


# ---- training -----------------------------------------------------------------------------------


def test_a_host_that_trains_sets_memory_apart_for_what_it_owns() -> None:
    """With AdamW in 16 bits two versions take 4 bytes a parameter, and what is owned 16."""
    serves, trains = (HostRoom.within(80 * GB, trains=trains) for trains in (False, True))
    assert trains.expert_bytes == serves.expert_bytes // 5
    total = trains.expert_bytes + trains.workspace_bytes
    assert total == serves.expert_bytes + serves.workspace_bytes
    master, gradient, state = UpdateRule("AdamW").bytes_of((1024, 1024), torch.bfloat16)
    assert round((master + gradient + state) / 2**20) == OWNED_PARAMETER_BYTES


@pytest.mark.parametrize("gpu_memory", [None, 90 * GB])
def test_what_serves_beside_little_room_does_not_train(gpu_memory: int | None) -> None:
    for trains, expected in ((False, []), (True, ["warning"])):
        plan = plan_cards(
            [card()], [host(gpu_memory=gpu_memory, trains=trains)], expert_bytes=30 * GB
        )
        found = [severity for severity, _ in said(plan)]
        assert found == (["error"] if trains and gpu_memory else expected)
    assert all("what training keeps" in one.message for one in plan.problems) or gpu_memory
