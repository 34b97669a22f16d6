"""Whole steps by orders to hosts: their weights are those of an optimizer over the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.cluster.expert_keys import TRUNK, ExpertKey
from moesaic.cluster.training.orders import BulkKey, Disown, GroupUpdate, NewlyOwned, Own
from moesaic.proto.errors import HostLost
from tests.helpers.training.steps import Steps, experts_in, same, versions
from tests.helpers.training.trunks import IDS, assert_near, loss_of, plain_model, saved, training

MICROBATCHES = (IDS, IDS[:1, 2:], IDS[1:, 3:])
UPDATE: dict[int, GroupUpdate] = {0: GroupUpdate(1.0, {"lr": 0.01})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


def is_of_experts(name: str) -> bool:
    return ".experts." in name


def assert_like(steps: Steps, plain: Any, tolerance: float) -> None:
    experts, served = experts_in(plain), steps.served()
    assert {key for key, _, _ in served} == experts.keys()
    for (key, host, name), tensor in served.items():
        assert_near(tensor, experts[key][name], tolerance, f"{key} {name} {host}")
    for name, parameter in plain.named_parameters():
        if not is_of_experts(name):
            assert_near(steps.parameters[name].detach(), parameter.detach(), tolerance, name)


@pytest.mark.parametrize(
    ("replicas", "redundancy", "times"), [(1, 0, 1), (2, 0, 2), (3, 1, 1), (1, 2, 3)]
)
def test_steps_are_those_of_an_optimizer_over_the_whole_model(
    folder: Path, replicas: int, redundancy: int, times: int
) -> None:
    """``times``: each order is sent so often."""
    plain = plain_model(folder, torch.float64)
    named = list(plain.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if is_of_experts(n)], "weight_decay": 0.1},
            {"params": [p for n, p in named if not is_of_experts(n)], "weight_decay": 0.0},
        ]
    )
    with training(folder, hosts=3, replicas=replicas, opened=False) as trunk:
        steps = Steps(
            trunk, redundancy=redundancy, times=times, groups=lambda key, _: key.layer == TRUNK
        )
        steps.open("AdamW", weight_decay=0.1)
        steps.own()
        idle = 0
        for lr, clip in ((0.01, 1.0), (0.02, 0.25), (0.005, 1.0)):
            optimizer.zero_grad()
            for ids in MICROBATCHES:
                loss_of(plain, ids).backward()
            total = sum(float(p.grad.square().sum()) for p in plain.parameters())
            for parameter in plain.parameters():
                parameter.grad.mul_(clip)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            groups = {
                0: GroupUpdate(clip, {"lr": lr, "weight_decay": 0.1}),
                1: GroupUpdate(clip, {"lr": lr, "weight_decay": 0.0}),
            }
            squares = steps.step(*MICROBATCHES, groups=groups)
            idle += sum(not any(one.values()) for one in squares.values())
            found = sum(square for one in squares.values() for square in one.values())
            assert found == pytest.approx(total, rel=1e-12)
            assert_like(steps, plain, 1e-12)
        assert idle, "all experts had tokens"
        kinds = {one.kind for _, one in steps.links.fetched if one.key.layer != TRUNK}
        everywhere = redundancy == 2  # nobody needs another owner's weights
        assert kinds == ({"gradient"} if everywhere else {"gradient", "weights"})


@pytest.mark.parametrize("exact", [False, True])
def test_owners_of_one_key_keep_the_same_bits(folder: Path, exact: bool) -> None:
    with training(
        folder, dtype=torch.float32, hosts=3, replicas=3, exact=exact, opened=False
    ) as trunk:
        steps = Steps(trunk, redundancy=1)
        steps.open()
        steps.own()
        for _ in range(3):
            steps.step(*MICROBATCHES, groups=UPDATE, exact=exact)
            for key, (first, second) in steps.owners.items():
                assert same(steps.state(key, first), steps.state(key, second)), key
            served = steps.served()
            for (key, _, name), tensor in served.items():
                owner = steps.owners[key][0]
                assert torch.equal(tensor, steps.state(key, owner)[f"{name}.master"])


def trained(
    folder: Path, *, moved: bool, near: bool | None = None
) -> dict[tuple[ExpertKey, str], Tensor]:
    """Return masters and state after four steps; ``moved``: owners change after two.

    With several replicas an expert's rows would be split by what hosts are doing just then.
    """
    with training(
        folder, dtype=torch.float32, hosts=3, exact=True, replicas=1, opened=False
    ) as trunk:
        steps = Steps(trunk, near=near)
        steps.open()
        steps.own()
        for number in range(4):
            if moved and number == 2:
                move(steps)
            steps.step(*MICROBATCHES, groups=UPDATE, exact=True)
        return {
            (key, entry): tensor
            for key, (host,) in steps.owners.items()
            for entry, tensor in steps.state(key, host).items()
        }


def move(steps: Steps) -> None:
    """Let every key go to the next host."""
    before, hosts = dict(steps.owners), sorted(steps.hosts)
    counts = {host: len(steps.owned_by(host)) for host in hosts}
    steps.owners = {
        key: (hosts[(hosts.index(host) + 1) % 3],) for key, (host,) in steps.owners.items()
    }
    for host in hosts:
        keys = {
            key: NewlyOwned(steps.groups(key), steps.entries[before[key][0]])
            for key in steps.owned_by(host)
        }
        steps.order(host, Own(run=steps.run, versions=versions(steps.version), step=0, keys=keys))
        assert steps.hosts[host].report().owned == counts[host] + len(keys)
    for host in hosts:
        gone = tuple(key for key, owners in before.items() if host in owners)
        for _ in range(2):
            steps.order(host, Disown(run=steps.run, keys=gone))
        assert steps.hosts[host].report().owned == len(steps.owned_by(host))


def test_state_that_moves_to_other_hosts_goes_on_to_the_bit(folder: Path) -> None:
    assert same(trained(folder, moved=True), trained(folder, moved=False))


@pytest.mark.parametrize("near", [True, False])
def test_transports_change_no_bit(folder: Path, near: bool) -> None:
    """Over shared memory, and over gRPC."""
    assert same(trained(folder, moved=True, near=near), trained(folder, moved=False))


@pytest.mark.parametrize("near", [True, False])
def test_a_host_that_has_ended_is_lost_to_the_others(folder: Path, near: bool) -> None:
    with training(folder, dtype=torch.float32, hosts=3, replicas=3, opened=False) as trunk:
        steps = Steps(trunk, redundancy=1, near=near)
        steps.open()
        steps.own()
        steps.step(*MICROBATCHES, groups=UPDATE)
        steps.begin()
        steps.backward(*MICROBATCHES)
        sources = steps.gather()
        steps.put_gradients()
        before = steps.states()
        steps.hosts["host-2"].close()
        for host in ("host-0", "host-1"):
            with pytest.raises(HostLost):
                steps.reduce_at(host, sources)
            mine = {at: tensor for at, tensor in before.items() if at[1] == host}
            found = {at: tensor for at, tensor in steps.states().items() if at[1] == host}
            assert same(mine, found)


@pytest.mark.parametrize("redundancy", [0, 1])
def test_weights_in_half_precision_are_rounded_once_from_their_masters(
    folder: Path, redundancy: int
) -> None:
    small: dict[int, GroupUpdate] = {0: GroupUpdate(1.0, {"lr": 1e-5})}
    with training(folder, dtype=torch.bfloat16, hosts=2, replicas=2, opened=False) as trunk:
        steps = Steps(trunk, redundancy=redundancy)
        steps.open()
        steps.own()
        before = {(k, n): t.float() for (k, _, n), t in steps.served().items()}
        for _ in range(3):
            steps.step(*MICROBATCHES, groups=small)
        served = steps.served()
        assert len(served) == 2 * len(before)
        unchanged = []
        for (key, _, name), tensor in served.items():
            for owner in steps.owners[key]:
                master = steps.state(key, owner)[f"{name}.master"]
                assert master.dtype == torch.float32
                assert tensor.dtype == torch.bfloat16
                assert torch.equal(tensor, master.bfloat16())
                assert not torch.equal(master, before[key, name])
            unchanged.append(float((tensor.float() == before[key, name]).double().mean()))
        assert 0.5 < sum(unchanged) / len(unchanged) < 1, "most are too small for bfloat16"


def test_what_has_no_group_is_frozen(folder: Path) -> None:
    """Some names of experts, and a block's; replicas take them from what they have."""

    def group(key: ExpertKey, name: str) -> int | None:
        if key.layer == TRUNK:
            return None if "norm" in name else 0
        return 0 if name == "up" else None

    plain = plain_model(folder, torch.float64)
    for name, parameter in plain.named_parameters():
        frozen = "norm" in name or "down_proj" in name
        parameter.requires_grad_(not frozen)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.01)
    with training(folder, hosts=3, replicas=2, opened=False) as trunk:
        steps = Steps(trunk, groups=group)
        steps.open()
        steps.own()
        for _ in range(2):
            optimizer.zero_grad()
            for ids in MICROBATCHES:
                loss_of(plain, ids).backward()
            optimizer.step()
            steps.step(*MICROBATCHES, groups={0: GroupUpdate(1.0, {"lr": 0.01})})
        assert_like(steps, plain, 1e-12)


def test_a_layer_without_sources_is_idle_or_left_out(folder: Path) -> None:
    """None leaves weights and state alone; no source is a gradient of zero."""
    with training(folder, hosts=2, opened=False) as trunk:
        steps = Steps(trunk)
        steps.open("SGD", momentum=0.9, weight_decay=0.1)
        steps.own()
        steps.step(*MICROBATCHES, groups=UPDATE)
        before = steps.states()
        steps.begin()
        sources = steps.gather()
        experts = [key for key in steps.owners if key.layer != TRUNK]
        left_out, idle = set(experts[::2]), set(experts[1::2])
        assert all(sources[key] == () for key in experts)
        blocks: dict[ExpertKey, tuple[str, ...] | None] = dict.fromkeys(steps.blocks, None)
        squares = steps.reduce({**sources, **dict.fromkeys(left_out, None), **blocks})
        assert all(squares[key] == {} for key in left_out | steps.blocks.keys())
        assert all(set(squares[key].values()) == {0.0} for key in idle)
        steps.commit(UPDATE)
        after = steps.states()
        changed = {key for key, _, _ in before if not_same(before, after, key)}
        assert changed == idle


def not_same(before: dict[Any, Tensor], after: dict[Any, Tensor], key: ExpertKey) -> bool:
    return not all(torch.equal(one, after[at]) for at, one in before.items() if at[0] == key)


def test_several_workers_are_summed_up_in_order_and_may_lack_names(folder: Path) -> None:
    with training(folder, dtype=torch.float32, hosts=2, opened=False) as trunk:
        steps = Steps(trunk)
        steps.open("SGD", lr=1.0)
        steps.own()
        steps.begin()
        steps.gather()
        key, names = next(iter(steps.blocks.items()))
        (owner,) = steps.owners[key]
        first, second, third, *_ = names
        shapes = {name: steps.parameters[name].shape for name in names}
        parts = {
            "a": {first: torch.full(shapes[first], 1.0), second: torch.ones(shapes[second])},
            "b": {first: torch.full(shapes[first], 2.0**-24, dtype=torch.bfloat16)},
            "c": {first: torch.full(shapes[first], 2.0**-24, dtype=torch.float64)},
        }
        sources: dict[ExpertKey, tuple[str, ...] | None] = dict.fromkeys(steps.owners, None)
        for order in ("abc", "cba"):
            steps.again()
            before = steps.state(key, owner)
            for source, tensors in parts.items():
                put(steps, owner, key, source, tensors)
            squares = steps.reduce({**sources, key: tuple(order)})[key]
            assert squares.keys() == {first, second}
            steps.commit({0: GroupUpdate(1.0, {"lr": 1.0})})
            after = steps.state(key, owner)
            # In float32 1 + 2^-24 is 1, but 2^-24 + 2^-24 + 1 is more.
            due = 1.0 if order == "abc" else 1.0 + 2.0**-23
            total = torch.full(shapes[first], due)
            assert torch.equal(after[f"{first}.master"], before[f"{first}.master"] - total)
            assert torch.equal(after[f"{third}.master"], before[f"{third}.master"])
            assert not torch.equal(after[f"{second}.master"], before[f"{second}.master"])
            steps.finish()


def put(steps: Steps, host: str, key: ExpertKey, source: str, tensors: dict[str, Tensor]) -> None:
    given = BulkKey("gradient", key, attempt=steps.attempt, source=source)
    steps.hosts[host].training.put(given, {name: t.clone() for name, t in tensors.items()})
