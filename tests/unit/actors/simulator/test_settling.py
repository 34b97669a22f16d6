"""When a simulated pool counts as settled."""

from __future__ import annotations

from moesaic.actors.simulator.host import SimHost
from moesaic.actors.simulator.invariants import unsettled
from moesaic.actors.simulator.world import World
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion


def settled_world() -> World:
    world = World(3)
    for router in world.routers.values():
        router.stop()
    while unsettled(world):
        world.step()
        assert world.violation is None
        assert world.clock.now < 60
    return world


def unwanted(world: World) -> tuple[SimHost, ExpertKey]:
    """A host, and an expert that the controller does not want there."""
    controller = world.registry.controller
    assert controller is not None
    control = controller.control
    assert control is not None
    for name, host in world.hosts.items():
        for shape in control.models.values():
            for layer, experts in shape.experts.items():
                for expert in range(experts):
                    key = ExpertKey(shape.model, layer, expert)
                    if key not in control.wanted(name) and not host.holds(ExpertVersion(key, 1)):
                        return host, key
    raise AssertionError("every host holds everything")


def test_a_pool_is_not_settled_while_a_host_loads_nor_just_after() -> None:
    world = settled_world()
    host, key = unwanted(world)
    controller = world.registry.controller
    assert controller is not None
    assert controller.control is not None
    shapes = list(controller.control.models.values())
    answers: list[object] = []
    host.load(shapes, [ExpertVersion(key, 1)], {}, controller.term, answers.append)
    assert unsettled(world) == "replicas are being moved"
    while not answers:
        world.step()
    assert answers == [None]
    assert host.holds(ExpertVersion(key, 1))
    assert unsettled(world) == "replicas are being moved"
