"""Hosts that are gone: when a run sees it, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest

from moesaic.cluster.expert_keys import ExpertKey, is_shared
from moesaic.proto.errors import StateLost
from tests.helpers.cluster.steps_world import TrainingWorld


def test_of_two_lost_hosts_the_one_that_owned_the_key_is_named() -> None:
    def pairs() -> Iterator[tuple[TrainingWorld, tuple[str, str], ExpertKey, str]]:
        for seed in range(20):
            world = TrainingWorld(seed, hosts=4, redundancy=0)
            for pair in combinations(sorted(world.hosts.names), 2):
                for key, (owner, *_) in world.steps.owners.items():
                    if owner in pair and not is_shared(key):
                        yield world, pair, key, owner
                        break

    # The first key without an owner is not one of the host that is lost first.
    world, pair, key, owner = next(found for found in pairs() if found[3] == found[1][1])
    for host in pair:
        world.hosts.lose(host)
    with pytest.raises(StateLost, match=f"hosts were lost .{owner}: it is gone.*{key} "):
        world.exchange(world.steps.follow(world.now()))


def test_a_restart_between_two_looks_is_seen() -> None:
    world = TrainingWorld(0, hosts=3, redundancy=1)
    key, (lost, *_) = next(iter(world.steps.owners.items()))
    world.hosts.restart(lost)
    world.follow()
    assert world.steps.lost == f"{lost}: it is gone"
    assert lost not in world.steps.owners[key]
    world.train(1, attempts=2)
    assert world.steps.step == 1


@pytest.mark.parametrize("comes_back", [False, True])
def test_an_attempt_begins_without_a_host_that_is_gone_before_the_pool_says_so(
    comes_back: bool,
) -> None:
    world = TrainingWorld(0, hosts=4, redundancy=1)
    seen, lost = world.now(), world.steps.owners[min(world.steps.owners)][0]
    if comes_back:
        world.hosts.restart(lost)
    else:
        world.hosts.lose(lost)
    world.exchange(world.steps.again(seen))
    assert world.steps.lost == ""
    assert lost not in {host for host, _ in world.steps.members}
    assert all(lost not in hosts for hosts in world.steps.owners.values())
    world.exchange(world.steps.again(seen))
    assert world.steps.lost == "", "the pool still names it"
    world.follow()
    world.train(1, attempts=2)
    assert world.steps.step == 1


def test_a_run_is_broken_by_a_host_that_is_gone_with_what_it_owns_as_an_attempt_begins() -> None:
    world = TrainingWorld(0, hosts=3, redundancy=0)
    seen, lost = world.now(), world.steps.owners[min(world.steps.owners)][0]
    world.hosts.lose(lost)
    world.exchange(world.steps.again(seen))
    assert "go back to a checkpoint" in world.steps.broken
    with pytest.raises(StateLost, match=f"hosts were lost .{lost}: {lost} is gone"):
        world.exchange(world.steps.again(seen))
