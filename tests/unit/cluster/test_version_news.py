"""What routers are told of new versions of weights: a message that does not grow with the model."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.placement import Placement, PlacementId, VersionChange
from moesaic.cluster.versions import WeightVersions
from tests.helpers.cluster.control_world import ControlWorld, shape

FIRST, OTHER = ExpertKey("m", 0, 0), ExpertKey("m", 1, 2)


def updated(world: ControlWorld, *keys: ExpertKey) -> Placement:
    """The placement that serves new weights of these experts."""
    world.update(list(keys), in_file=False)
    world.rounds(3.0)
    world.serve("m")
    world.tick()
    return world.published[-1]


def pool(*, hosts: int = 2) -> ControlWorld:
    world = ControlWorld(hosts, [(shape("m", replicas=2), True)])
    world.settle()
    return world


def test_a_router_that_has_the_layers_gets_the_versions_alone() -> None:
    world = pool()
    before = world.published[-1]
    after = updated(world, FIRST)
    news = world.control.publisher.news(before.id)
    assert isinstance(news, VersionChange)
    assert news.applied_to(before) == after
    assert news.applied_to(before).layers is before.layers, "what was made of them stays"
    # One that is two changes behind gets both at once.
    last = updated(world, OTHER)
    news = world.control.publisher.news(before.id)
    assert isinstance(news, VersionChange)
    assert news.applied_to(before) == news.applied_to(after) == last
    assert world.control.publisher.news(last.id) is None


def test_a_router_without_the_layers_gets_everything() -> None:
    world = pool()
    after = updated(world, FIRST)
    earlier_term = PlacementId(after.id.term - 1, 99)
    for received in (None, earlier_term):
        assert world.control.publisher.news(received) == after


def test_other_hosts_or_replicas_are_told_whole() -> None:
    world = pool()
    before = updated(world, FIRST)
    world.kill("h1")
    world.tick()
    after = world.published[-1]
    assert after.id > before.id
    assert world.control.publisher.news(before.id) == after


def test_a_change_fits_no_other_placement() -> None:
    place = Placement(PlacementId(2, 5), {}, {})
    change = VersionChange(
        since=PlacementId(2, 6), id=PlacementId(2, 9), versions=WeightVersions({"m": 3})
    )
    assert change.applied_to(replace(place, id=PlacementId(2, 7))).versions.of(FIRST) == 3
    for wrong in (PlacementId(2, 5), PlacementId(2, 9), PlacementId(3, 1)):
        with pytest.raises(ValueError, match="says what has changed since"):
            change.applied_to(replace(place, id=wrong))


def test_a_step_of_a_large_model_is_a_small_message() -> None:
    # A training step gives all experts of a model one new number, whatever was updated before.
    change = VersionChange(
        since=PlacementId(2, 6), id=PlacementId(2, 9), versions=WeightVersions({"m": 1_000_000})
    )
    assert len(pickle.dumps(change)) < 500
