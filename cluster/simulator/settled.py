"""When a simulated pool stands again: every call ended, everything where the target wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..changes import Phase
from ..control import Control
from ..placement import ExpertKey
from ..room import lack

if TYPE_CHECKING:
    from .controller import SimController
    from .world import World

# Nothing is loaded, published or evicted for so many seconds.
_QUIET_S = 0.8


def unsettled(world: World) -> str:
    """Why the pool does not stand yet; empty when it does."""
    controller = world.registry.controller
    if len(world.controllers) != 1 or controller is None or controller.control is None:
        return f"{len(world.controllers)} controllers"
    control = controller.control
    calling = [router.name for router in world.routers.values() if router.call is not None]
    if calling:
        return f"{calling} have calls in progress"
    if world.clock.now - world.last_change < _QUIET_S:
        return "replicas are being moved"
    if not all(host.alive for host in world.hosts.values()):
        return "hosts are away"
    behind = [
        router.name
        for router in world.routers.values()
        if router.dispatcher.placement is None
        or router.dispatcher.placement.number != control.number
    ]
    if behind or not world.routers:
        return f"{behind} do not follow placement {tuple(control.number)}"
    return _size_lacks(world, controller) or _target_lacks(world, control)


def _size_lacks(world: World, controller: SimController) -> str:
    fleet, control = controller.sizing.fleet, controller.control
    assert control is not None
    desired = fleet.desired()
    if world.hosts.keys() != desired.keys():
        return f"hosts {sorted(world.hosts)} live, and {sorted(desired)} are wanted"
    left = [h for n, h in control.view.hosts.items() if n not in control.leaving]
    no_room = lack(
        left, list(control.models.values()), redundancy=control.policy.balance.redundancy
    )
    # Where too much is drained, those that leave have nowhere to leave their experts.
    if fleet.retired() and not no_room:
        return f"{fleet.retired()} are still to leave"
    return ""


def _target_lacks(world: World, control: Control) -> str:
    for host in world.hosts:
        for key in control.wanted(host):
            if not world.hosts[host].holds(key) and not _gone_for_good(world, key):
                return f"{key} is wanted on {host} and not there"
    for shape in control.models.values():
        for layer, experts in shape.experts.items():
            for expert in range(experts):
                key = ExpertKey(shape.model, layer, expert)
                alive = any(host.holds(key) for host in world.hosts.values())
                # The controller says so where there is no room, as when too much is drained.
                if not alive and key not in control.unplaced and not _gone_for_good(world, key):
                    return f"nobody holds {key}"
    last = control.changes.all[-1] if control.changes.all else None
    if last is not None and last.phase is Phase.LOADING:
        return f"change {last.id} ({last.why}) is still under way"
    return ""


def _gone_for_good(world: World, key: ExpertKey) -> bool:
    """Its model was in memory alone, and every replica has died."""
    return key.model in world.settings.in_memory and not any(
        host.holds(key) for host in world.hosts.values()
    )
