"""A run goes on in another process: what the controller says to it and to the one before."""

from __future__ import annotations

import json

import pytest

from moesaic.cluster.training.runs import RUN_LEASE_S, LivingRun
from moesaic.proto.errors import ClusterError, Superseded
from tests.helpers.cluster.training_world import TrainingWorld


def test_a_run_goes_on_in_another_process_under_the_next_number() -> None:
    world = TrainingWorld()
    first = world.begin("ann").run
    world.own("h0")
    world.step()
    version = world.commit({"h0"})
    lost = world.publish(version)
    training = world.control.training
    for who in ("bob", "cem"):
        training.succeed("m", who=who, now=world.now)
    found = world.alive
    assert (found.run, found.since, found.who, found.steps) == (first + 2, first, "cem", 1)
    assert found.next_version == version
    training.skip(found.run, version)
    assert found.next_version == version + 1, "a host that is lost may have committed it"
    assert "has followed" in lost.error
    for number in (first, first + 1):
        with pytest.raises(Superseded, match=rf"run {number} was followed by run {first + 2} .cem"):
            training.renew(number, world.now)
        assert training.is_alive(number), "hosts have not heard of it yet"
    assert not training.is_alive(first + 3)
    world.rounds(1.0)
    assert world.hosts["h0"].owned, "hosts keep what they own"
    asked = world.publish(world.commit())
    world.rounds(1.0)
    assert asked.served
    kept = json.loads(json.dumps(training.snapshot()))
    assert LivingRun(**kept["alive"]) == world.alive


def test_only_a_run_that_lives_is_followed() -> None:
    world = TrainingWorld()
    training = world.control.training
    with pytest.raises(ClusterError, match="no run that trains it lives; begin a new one"):
        training.succeed("m", who="ann", now=world.now)
    world.begin()
    with pytest.raises(ClusterError, match="model 'other': no run that trains it lives"):
        training.succeed("other", who="ann", now=world.now)
    world.rounds(RUN_LEASE_S + 1.0)
    with pytest.raises(ClusterError, match="the last one has ended: nothing was heard of it"):
        training.succeed("m", who="ann", now=world.now)
