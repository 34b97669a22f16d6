"""Which experts a host is told to load next, and how many at a time."""

from __future__ import annotations

from moesaic.cluster.control.loading import Loader
from moesaic.cluster.expert_keys import first_versions
from tests.helpers.cluster.control_world import ControlWorld, shape


def test_a_target_with_more_than_a_hosts_slots_is_loaded_all_the_same() -> None:
    """An even part of what models need is less when hosts come back."""
    world = ControlWorld(2, [(shape("m", replicas=2, experts=16, layers=1), True)])
    world.settle()
    loader = Loader(world.control.view, bytes_per_s=1e9, batch_bytes=1 << 20, retry_s=1.0)
    loader.on_disk.add("m")
    loader.slots["h0"] = 8
    held = world.hosts["h0"].held
    wanted = sorted(key for key, _ in held)
    lost = first_versions(wanted[:3])
    held -= set(lost)
    world.control.view.note({"h0": world.hosts["h0"].observe()}, world.now)
    found = loader.next("h0", wanted, models=world.control.models, appeared=["m"], now=world.now)
    assert found is not None
    assert list(found.weights) == lost


def test_background_loads_are_spread_over_the_time_that_they_may_take() -> None:
    world = ControlWorld(2, [(shape("m", replicas=2, experts=16, layers=1), True)])
    world.settle()
    loader = Loader(world.control.view, bytes_per_s=8.0, batch_bytes=1 << 20, retry_s=1.0)
    loader.on_disk.add("m")
    held = world.hosts["h0"].held
    wanted = sorted(key for key, _ in held)
    held -= set(first_versions(wanted[:4]))
    world.control.view.note({"h0": world.hosts["h0"].observe()}, world.now)

    def ask(after_s: float) -> int:
        found = loader.next(
            "h0", wanted, models=world.control.models, appeared=["m"], now=world.now + after_s
        )
        return 0 if found is None else len(found.weights)

    # Experts of one byte: two in a quarter of a second.
    assert [ask(after_s) for after_s in (0.0, 0.2, 0.26, 0.3)] == [2, 0, 2, 0]
