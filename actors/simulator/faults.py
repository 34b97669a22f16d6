"""Faults and operators' constraints at random times: what may go wrong in a pool, and for how long.

Each seed uses only some of the kinds ("Swarm Testing", Groce et al., ISSTA 2012): rare combinations
then come up more often than if every run had all kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ...cluster.expert_keys import ExpertKey
from ...cluster.planner.constraints import (
    with_drain,
    with_min_replicas,
    with_pin,
    without_drain,
    without_pin,
)
from ...cluster.planner.plan import OperatorConstraints
from .clock import SimProcess
from .network import NetworkFaults

if TYPE_CHECKING:
    from .world import World

T = TypeVar("T")

# Mean seconds between two faults.
_EVERY_S = 0.6


class Faults:
    """Picks faults and carries them out; `stop` heals everything."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self._world = world
        self._rng = rng
        self.kinds: dict[str, Callable[[], bool]] = {}
        self.active = False
        self._bad_loads = self._bad_plans = self._no_machines = False
        every = self._every_kind()
        chosen = [name for name in every if rng.random() < 0.5] or ["host crash"]
        self.kinds = {name: every[name] for name in chosen}

    # ---- when -----------------------------------------------------------------------------------

    def start(self) -> None:
        self.active = True
        self._later()

    def stop(self) -> None:
        """End all faults: every process runs and answers, and the network loses nothing."""
        self.active = False
        self._bad_loads = self._bad_plans = self._no_machines = False
        world = self._world
        world.network.network_faults = NetworkFaults()
        processes = *world.hosts.values(), *world.routers.values(), *world.controllers, world.owner
        for process in processes:
            if process.alive and process.frozen:
                process.wake()
        for host in world.hosts.values():
            host.slowness = 1.0
        world.log("faults stop")

    def _later(self) -> None:
        delay_s = float(self._rng.exponential(_EVERY_S))
        self._world.clock.after(delay_s, "a fault", self._strike)

    def _strike(self) -> None:
        if not self.active:
            return
        name = self._pick(list(self.kinds))
        if self.kinds[name]():
            self._world.network.tally.count(name)
        self._later()

    # ---- questions of processes -----------------------------------------------------------------

    def load(self, mean_s: float) -> tuple[float, bool]:
        """Return (the seconds that loading one expert takes, whether it fails)."""
        took_s = float(self._rng.exponential(mean_s))
        if self._bad_loads and self._rng.random() < 0.1:
            self._world.network.tally.count("load hangs")
            took_s += float(self._rng.uniform(3.0, 8.0))
        fails = self._bad_loads and bool(self._rng.random() < 0.2)
        if fails:
            self._world.network.tally.count("load fails")
        return took_s, fails

    def start_s(self, mean_s: float) -> float:
        """Return the seconds until a new host is up."""
        late_s = float(self._rng.uniform(1.0, 8.0)) if self._no_machines else 0.0
        return late_s + float(self._rng.exponential(mean_s))

    def plan(self, mean_s: float) -> float:
        return float(self._rng.exponential(mean_s * (10 if self._bad_plans else 1)))

    def planner_fails(self) -> bool:
        return self._bad_plans and bool(self._rng.random() < 0.3)

    # ---- kinds ----------------------------------------------------------------------------------

    def _every_kind(self) -> dict[str, Callable[[], bool]]:
        world = self._world
        return {
            "host crash": self._crash,
            "host hang": lambda: self._hang(list(world.hosts.values()), 0.2, 6.0),
            "slow host": self._slow,
            "connection cut": self._cut,
            "bad network": self._storm,
            "router frozen": lambda: self._hang(list(world.routers.values()), 0.5, 5.0),
            "router killed": self._kill_router,
            "controller killed": self._kill_controller,
            "controller frozen": lambda: self._hang(world.controllers, 0.5, 5.0),
            "two controllers": world.second_controller,
            "bad loads": lambda: self._for_a_while("_bad_loads"),
            "bad planner": lambda: self._for_a_while("_bad_plans"),
            "traffic shifts": self._shift,
            "constrain": self._constrain,
            "scale": self._scale,
            "no machines": lambda: self._for_a_while("_no_machines"),
            "owner frozen": lambda: self._hang([world.owner], 0.5, 5.0),
            "rollback": self._roll_back,
            "keeper killed": self._kill_keeper,
        }

    def _crash(self) -> bool:
        living = [host for host in self._world.hosts.values() if host.alive]
        if not living:
            return False
        self._world.crash_host(self._pick(living), back_s=float(self._rng.uniform(0.1, 4.0)))
        return True

    def _hang(self, processes: Sequence[SimProcess], least_s: float, most_s: float) -> bool:
        awake = [one for one in processes if one.alive and not one.frozen]
        if not awake:
            return False
        process = self._pick(awake)
        process.freeze()
        self._world.log(f"{process.name} freezes")

        def wake() -> None:
            if process.alive and process.frozen:
                process.wake()

        hang_s = float(self._rng.uniform(least_s, most_s))
        self._world.clock.after(hang_s, f"{process.name} wakes", wake)
        return True

    def _slow(self) -> bool:
        if not self._world.hosts:
            return False
        host = self._pick(list(self._world.hosts.values()))
        host.slowness = float(self._rng.uniform(10.0, 100.0))

        def recover() -> None:
            host.slowness = 1.0

        slow_s = float(self._rng.uniform(0.5, 4.0))
        self._world.clock.after(slow_s, f"{host.name} is fast again", recover)
        return True

    def _cut(self) -> bool:
        lines = [line for line in self._world.network.connections if line.open]
        if lines:
            self._pick(lines).close(by=None)
        return bool(lines)

    def _storm(self) -> bool:
        network = self._world.network
        bad = network.network_faults = NetworkFaults(
            lost=float(self._rng.choice([0.0, 0.02, 0.1])),
            repeated=float(self._rng.choice([0.0, 0.05, 0.3])),
            corrupted=float(self._rng.choice([0.0, 0.05])),
            late=float(self._rng.choice([0.0, 0.05, 0.3])),
        )

        def clear() -> None:
            if network.network_faults is bad:
                network.network_faults = NetworkFaults()

        self._world.clock.after(
            float(self._rng.uniform(0.2, 2.0)), "the network has recovered", clear
        )
        return True

    def _kill_router(self) -> bool:
        routers = list(self._world.routers.values())
        if not routers:
            return False
        self._world.kill_router(self._pick(routers), back_s=float(self._rng.uniform(0.1, 2.0)))
        return True

    def _kill_controller(self) -> bool:
        controller = self._world.registry.controller
        if controller is None:
            return False
        self._world.controller_ends(controller, back_s=float(self._rng.uniform(0.1, 3.0)))
        return True

    def _for_a_while(self, what: str) -> bool:
        setattr(self, what, True)
        clear_s = float(self._rng.uniform(1.0, 5.0))
        self._world.clock.after(
            clear_s, f"no more{what.replace('_', ' ')}", lambda: setattr(self, what, False)
        )
        return True

    def _shift(self) -> bool:
        self._world.traffic.shift()
        return True

    def _constrain(self) -> bool:
        """Let an operator give a random order to the controller that Ray knows, if it answers."""
        world, rng = self._world, self._rng
        controller = world.registry.controller
        if controller is None or controller.control is None or controller.frozen:
            return False
        view = controller.control.view
        hosts = [name for name in view.hosts if name not in view.retiring]
        host = self._pick(hosts)
        shape = self._pick(list(world.settings.models))
        layer = self._pick(sorted(shape.experts))
        key = ExpertKey(shape.model, layer, int(rng.integers(shape.experts[layer])))
        count = int(rng.integers(1, len(hosts) + 1))
        changes: list[Callable[[OperatorConstraints], OperatorConstraints]] = [
            lambda constraints: with_drain(constraints, host, hosts),
            lambda constraints: without_drain(constraints, host),
            lambda constraints: without_drain(constraints, host),
            lambda constraints: with_min_replicas(constraints, key, count, hosts),
            lambda constraints: with_pin(constraints, key, host),
            lambda constraints: without_pin(constraints, key, host),
        ]
        try:
            controller.constrain(self._pick(changes))
        except ValueError:
            return False  # the last host cannot be drained
        world.log(f"an operator's constraints: {world.registry.constraints}")
        return True

    def _scale(self) -> bool:
        """Let an operator change the number of hosts of a group."""
        controller = self._world.registry.controller
        if controller is None or controller.control is None or controller.frozen:
            return False
        group = int(self._rng.integers(len(self._world.settings.groups)))
        most = self._world.settings.groups[group].max_count
        count = int(self._rng.integers(1, most + 1))
        try:
            controller.scale(group, count)
        except ValueError as error:
            self._world.log(f"an operator wants {count} hosts in group {group}: {error}")
            return False
        self._world.log(f"an operator wants {count} hosts in group {group}")
        return True

    def _roll_back(self) -> bool:
        controller = self._world.registry.controller
        if controller is None or controller.control is None or controller.frozen:
            return False
        return controller.roll_back() is not None

    def _kill_keeper(self) -> bool:
        if not self._world.settings.lends:
            return False
        self._world.kill_keeper(self._pick(sorted(self._world.keepers)))
        return True

    def _pick(self, some: Sequence[T]) -> T:
        return some[int(self._rng.integers(len(some)))]
