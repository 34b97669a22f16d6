"""Updates of experts' weights: they arrive beside what is served, and one placement names them."""

from __future__ import annotations

import pytest

from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, LayerKey
from moesaic.cluster.weight_updates import WeightUpdate, new_weights
from tests.helpers.cluster.control_world import POLICY, ControlWorld, shape

FIRST, OTHER = ExpertKey("m", 0, 0), ExpertKey("m", 1, 2)


def pool() -> ControlWorld:
    world = ControlWorld(2, [(shape("m", replicas=2), True)])
    world.settle()
    return world


def begin(world: ControlWorld, *keys: ExpertKey, in_file: bool = False) -> WeightUpdate:
    world.update(list(keys), in_file=in_file)
    return world.updates["m"]


def holders(world: ControlWorld, weights: ExpertVersion) -> list[str]:
    return [name for name, host in world.hosts.items() if weights in host.held]


def test_an_update_spreads_before_it_is_served_and_is_served_at_once() -> None:
    world = pool()
    update = begin(world, FIRST, OTHER)
    assert (update.number, update.before) == (2, {FIRST: 1, OTHER: 1})
    (one, other) = update.weights
    assert not world.control.updates.is_ready(update), "one host has it, and two serve the expert"
    published = len(world.published)
    world.rounds(3.0)
    assert holders(world, one) == holders(world, other) == ["h0", "h1"]
    assert len(world.published) == published, "nothing is served yet"
    assert world.control.updates.is_ready(update)
    world.serve("m")
    world.tick()
    versions = world.published[-1].versions
    assert len(world.published) == published + 1
    assert [versions.of(key) for key in (FIRST, OTHER, ExpertKey("m", 0, 1))] == [2, 2, 1]
    assert all(len(e) == 2 for layer in world.published[-1].layers.values() for e in layer.replicas)
    # The older version goes when no router uses it any more.
    assert len(holders(world, ExpertVersion(FIRST, 1))) == 2
    world.rounds(1.5)
    assert holders(world, ExpertVersion(FIRST, 1)) == []


def test_an_update_that_is_not_served_in_time_leaves_no_trace() -> None:
    world = pool()
    update = begin(world, FIRST)
    with pytest.raises(ValueError, match=r"models\.m: update 2 is under way"):
        world.control.updates.begin("m", [OTHER], who="test", until=world.now + 1.0)
    world.rounds(21.0)
    assert holders(world, ExpertVersion(FIRST, 2)) == []
    assert world.published[-1].versions.of(FIRST) == 1
    with pytest.raises(ValueError, match=r"update 2 of m has already ended"):
        world.control.updates.serve(update, in_file=False)
    world.updates.clear()
    assert begin(world, FIRST).number == 3, "hosts may have kept something under the number 2"


def test_an_update_without_weights_cannot_be_served() -> None:
    world = pool()
    update = world.control.updates.begin("m", [FIRST, OTHER], who="t", until=world.now + 9.0)
    assert not world.control.updates.is_ready(update)
    with pytest.raises(ValueError, match="no host holds version 2 of expert 0 of layer 0 of m"):
        world.control.updates.serve(update, in_file=False)


def served(world: ControlWorld, *keys: ExpertKey, in_file: bool = False) -> None:
    begin(world, *keys, in_file=in_file)
    world.rounds(3.0)
    world.serve("m")
    world.rounds(POLICY.lease_s)


def test_reverting_goes_back_update_by_update() -> None:
    world = pool()
    served(world, FIRST, OTHER, in_file=True)
    served(world, FIRST)
    for versions in ({FIRST: 2, OTHER: 2}, {FIRST: 1, OTHER: 1}):
        world.revert("m")
        world.rounds(3.0)
        world.serve("m")
        world.rounds(POLICY.lease_s)
        placed = world.published[-1].versions
        assert {key: placed.of(key) for key in versions} == versions
        assert holders(world, placed.served(FIRST)) == ["h0", "h1"]
    with pytest.raises(ValueError, match=r"no update of its weights is in effect"):
        world.control.updates.begin_revert("m", who="t", until=world.now + 9.0)


def test_what_is_nowhere_any_more_cannot_come_back() -> None:
    world = pool()
    served(world, FIRST)
    served(world, FIRST)
    world.revert("m")
    gone = world.updates["m"].weights
    assert gone == world.control.weights.lost(gone) == [ExpertVersion(FIRST, 2)]
    world.rounds(3.0)
    assert not world.control.updates.is_ready(world.updates["m"]), "version 2 was in memory only"
    world.rounds(20.0)
    assert world.published[-1].versions.of(FIRST) == 3


def test_a_new_controller_goes_on_with_the_versions_that_are_served() -> None:
    world = pool()
    served(world, FIRST)
    begin(world, OTHER)
    world.take_over()
    world.rounds(POLICY.lease_s * 2)
    placed = world.published[-1]
    assert (placed.id.term, placed.versions.of(FIRST), placed.versions.of(OTHER)) == (2, 2, 1)
    assert holders(world, ExpertVersion(OTHER, 3)) == [], "no controller knows of it any more"
    assert begin(world, OTHER).number == 4


def restart_all(world: ControlWorld) -> None:
    for name in world.hosts:
        world.kill(name)
        world.restart(name)
    world.rounds(4.0)


def test_an_older_version_is_never_served_for_one_that_is_lost() -> None:
    world = pool()
    served(world, FIRST)
    restart_all(world)
    assert world.control.missing() == {FIRST: "lost: only hosts' memory had version 2"}
    assert world.published[-1].versions.of(FIRST) == 2
    assert world.published[-1].layers[FIRST.model, FIRST.layer].replicas[FIRST.expert] == ()  # pyright: ignore[reportArgumentType]


def test_a_version_in_a_file_is_loaded_again() -> None:
    world = pool()
    served(world, FIRST, in_file=True)
    restart_all(world)
    assert world.control.missing() == {}
    assert holders(world, ExpertVersion(FIRST, 2)) == ["h0", "h1"]


def test_a_lost_version_does_not_take_its_model_along_when_the_controller_changes() -> None:
    world = pool()
    served(world, FIRST)
    restart_all(world)
    world.take_over()
    world.rounds(8.0)
    placed = world.published[-1]
    assert placed.id.term == 2
    assert placed.layers[LayerKey("m", 0)].hosts(0) == ()
    assert set(placed.layers[LayerKey("m", 0)].hosts(1)) == {"h0", "h1"}


# ---- updates that a file has --------------------------------------------------------------------


def test_an_update_that_is_held_waits_for_its_record_as_long_as_that_takes() -> None:
    world = pool()
    update = begin(world, FIRST)
    world.rounds(3.0)
    world.control.updates.hold(update)
    world.rounds(60.0)
    world.control.updates.serve(update, in_file=True)
    world.tick()
    assert world.published[-1].versions.of(FIRST) == 2
    assert world.control.weights.volatile(world.control.models["m"]) == []
    assert world.control.weights.updated(world.control.models["m"]) == [ExpertVersion(FIRST, 2)]


def test_only_what_some_host_has_can_be_held() -> None:
    world = pool()
    update = world.control.updates.begin("m", [FIRST], who="t", until=world.now + 9.0)
    with pytest.raises(ValueError, match="no host holds version 2 of expert 0"):
        world.control.updates.hold(update)


def test_the_updates_of_a_folder_are_served_from_the_start() -> None:
    """All hosts are new, and read what the last record names."""
    other = ExpertKey("m", 1, 2)
    history = [
        WeightUpdate(
            model="m", number=2, versions={FIRST: 2, other: 2}, before={FIRST: 1, other: 1}, who="t"
        ),
        WeightUpdate(model="m", number=5, versions={FIRST: 5}, before={FIRST: 2}, who="t"),
    ]
    world = ControlWorld(2, [(shape("m", replicas=2), True)])
    world.control.updates.replay("m", history, 7)
    world.saved = {one for update in history for one in new_weights(update)}
    world.settle()
    versions = world.published[-1].versions
    assert [versions.of(key) for key in (FIRST, other, ExpertKey("m", 0, 1))] == [5, 2, 1]
    assert holders(world, ExpertVersion(FIRST, 5)) == ["h0", "h1"]
    assert holders(world, ExpertVersion(FIRST, 1)) == []
    assert world.control.weights.volatile(world.control.models["m"]) == []
    assert world.control.updates.last_number("m") == 5
    assert begin(world, FIRST).number == 8, "the folder has a file of each number up to 7"


def test_a_folder_rules_over_what_an_earlier_controller_knew() -> None:
    """It died after the record was written, before it stored the same for its successors."""
    world = pool()
    begin(world, FIRST)
    world.rounds(3.0)
    world.serve("m")
    kept = world.control.snapshot()
    successor = pool().control
    successor.restore(kept)
    history = [*successor.updates.past]
    history.append(
        WeightUpdate(model="m", number=3, versions={FIRST: 3}, before={FIRST: 2}, who="t")
    )
    successor.updates.replay("m", history, 3)
    assert successor.weights.updated(successor.models["m"]) == [ExpertVersion(FIRST, 3)]
    assert [one.number for one in successor.updates.past] == [2, 3]
