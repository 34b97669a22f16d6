"""A whole pool in one thread: hosts, trunks, controllers and a network, on a virtual clock.

A seed determines everything that happens. State machines, planner and the shells of routers and
hosts (`Router`, `HostLoop`, with connections, memory and arithmetic) are the real ones; transports,
the controller's shell and whatever waits are rewritten here, with events in place of sockets,
threads and Ray calls. After every event the invariants are checked, and the first violation ends
the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ...cluster.control.control import Control
from ...cluster.expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion
from ...cluster.placement import HostEntry
from ...cluster.planner.plan import OperatorConstraints
from ...cluster.scaling.fleet import Fleet
from ...proto.errors import HostLost, describe_error
from .clock import Clock
from .controller import SimController
from .experts import CHECKPOINT, tensors_of
from .faults import Faults
from .host import SimHost, SimKeeper
from .invariants import Invariants, unsettled
from .network import Network
from .owner import SimOwner
from .router import SimRouter
from .settings import Settings, draw
from .trace_events import Fact
from .traffic import Traffic, Updates

if TYPE_CHECKING:
    from .controller import SimController


class KeyValueStore:
    """Ray's key-value store: never fails; single operations are atomic, sequences are not."""

    def __init__(self) -> None:
        self.controller: SimController | None = None
        self.latest_term = 0
        self.constraints = OperatorConstraints()
        self.fleet = ""  # as JSON
        self.updates: dict[int, str] = {}  # by the term of the controller, as JSON
        # Hosts that may be ended -> when the controller asked for the reports that allowed it.
        self.let_go: dict[str, float] = {}
        self._terms: set[int] = set()

    def served_version(self, key: ExpertKey) -> int:
        """Return the version that the newest controller has stored as served."""
        if not self.updates:
            return FIRST_VERSION
        kept = json.loads(self.updates[max(self.updates)])
        found = [version for *other, version in kept["experts"] if ExpertKey(*other) == key]
        return found[0] if found else kept["models"].get(key.model, FIRST_VERSION)

    def put_term(self, term: int) -> bool:
        """Put a term if it is absent; return whether it was."""
        absent = term not in self._terms
        self._terms.add(term)
        return absent


FAULTS_S = 12.0
# Seconds before faults begin, and seconds after the last fault within which the pool must settle.
WARM_UP_S = 2.0
SETTLE_S = 60.0
_KEPT_LINES = 60
# More events than this without progress of the clock mean an endless loop.
_AT_ONCE = 5000


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that does not hold, and the event after which it was found."""

    invariant: str
    message: str
    event: str
    when: float


class World:
    """All processes of one simulated pool, with their clock, network, faults and invariants."""

    def __init__(self, seed: int, settings: Settings | None = None) -> None:
        # One generator for each purpose, so that a change in one does not change all the others.
        size, network, faults, traffic, self._rng, updates = (
            np.random.default_rng([seed, purpose]) for purpose in range(6)
        )
        self.seed = seed
        self.settings = settings or draw(size)
        self.clock = Clock()
        self.network = Network(self.clock, network)
        self.registry = KeyValueStore()
        self.traffic = Traffic(self.settings, traffic)
        self.faults = Faults(self, faults)
        self.updates = Updates(self, updates)
        # The contents of later versions: in the files of updates, and as they were served.
        self.update_files: dict[ExpertVersion, int] = {}
        self.contents: dict[ExpertVersion, int] = {}
        self.violation: Violation | None = None
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._digest = hashlib.sha256()
        self._facts: list[Fact] = []
        self._at_once = 0
        self.calls = 0  # layer calls that trunks made
        self.last_change = 0.0  # when something was last published, loaded or evicted
        self.keepers = {f"n{index}": SimKeeper() for index in range(self.settings.nodes)}
        self.hosts: dict[str, SimHost] = {}
        self.routers: dict[str, SimRouter] = {}
        self.controllers: list[SimController] = []
        self._started = {"controller": 0, "router": 0}
        self.invariants = Invariants(self)
        first = Fleet(self.settings.groups, self.settings.scale, pending_s=1.0)
        self.owner = SimOwner(self, first.desired())
        self.start_controller()
        for _ in range(self.settings.routers):
            self.start_router()
        if self.settings.in_memory:
            self.clock.after(0.1, "a trunk attaches its model", self._attach)

    # ---- running --------------------------------------------------------------------------------

    def run(self, faults_s: float) -> Violation | None:
        """Warm up, inject faults for ``faults_s`` seconds, and wait until the pool settles."""
        self._run_until(WARM_UP_S)
        self.faults.start()
        self.updates.start()
        self._run_until(WARM_UP_S + faults_s)
        if self.violation is None:
            self.faults.stop()
            self.updates.stop()
            self._settle()
        return self.violation

    def _run_until(self, when: float) -> None:
        while self.violation is None and self.clock.now < when:
            self.step()

    def _settle(self) -> None:
        end = self.clock.now + SETTLE_S
        half = self.clock.now + self.settings.router.deadline_s / 2
        while self.violation is None:
            if self.clock.now > half:
                for router in self.routers.values():
                    router.stop()
            self.step()
            why = unsettled(self) if self.clock.now > half else "the time has not come"
            if not why:
                return
            if self.clock.now > end:
                self.fail("converges", f"{SETTLE_S:g} s after the last fault: {why}", "")

    def step(self) -> None:
        """Run one event, and check the invariants after it."""
        before, event = self.clock.now, self.clock.next()
        self._at_once = self._at_once + 1 if event.when == before else 0
        if self._at_once > _AT_ONCE:
            self.fail("time goes on", f"{_AT_ONCE} events in one moment", event.what)
            return
        self.log(event.what)
        try:
            event.act()
        except Exception as error:
            # Any exception counts, because it would have ended a real process.
            self.lines += traceback.format_exc().splitlines()
            self.fail("no process fails", describe_error(error), event.what)
            return
        facts, self._facts = self._facts, []
        broken = self.invariants.check(facts)
        if broken is not None:
            self.fail(*broken, event.what)

    def fail(self, invariant: str, message: str, event: str) -> None:
        self.violation = Violation(invariant, message, event, self.clock.now)

    def tell(self, fact: Fact) -> None:
        """Record something that happened, for the invariants."""
        self._facts.append(fact)

    def log(self, what: str) -> None:
        line = f"{self.clock.now:10.6f}  {what}"
        self.lines.append(line)
        self._digest.update(line.encode())

    @property
    def digest(self) -> str:
        """The hash of the whole log of events."""
        return self._digest.hexdigest()

    # ---- what processes ask of the world --------------------------------------------------------

    def make_control(self, fleet: Fleet, term: int) -> Control:
        return Control(fleet.pool_hosts(), term=term, policy=self.settings.control)

    def node_of(self, name: str) -> str:
        """Return the node of a host or router; names end with their numbers."""
        return f"n{int(name.lstrip('abcdefghijklmnopqrstuvwxyz-')) % self.settings.nodes}"

    def fetch(self, peer: HostEntry, weights: ExpertVersion) -> Mapping[str, Tensor]:
        """Return an expert that a peer has. Raises HostLost and NotHere."""
        for host in self.hosts.values():
            if host.entry.target == peer.target and host.alive and not host.frozen:
                return host.store.get(weights)
        raise HostLost(f"{peer.host} does not answer")

    # ---- life and death -------------------------------------------------------------------------

    def crash_host(self, host: SimHost, *, back_s: float) -> None:
        self.log(f"{host.name} crashes")
        self.invariants.died(host)
        host.kill()
        self.clock.after(back_s, f"Ray restarts {host.host}", lambda: self._restart(host))

    def _restart(self, host: SimHost) -> None:
        if self.hosts.get(host.host) is host:
            self.hosts[host.host] = SimHost(host.host, host.incarnation + 1, self)

    def kill_keeper(self, node: str) -> None:
        """Kill a node's memory keeper; the node's hosts start another one."""
        self.log(f"the keeper of {node} is killed")
        self.keepers[node].close()
        self.keepers[node] = SimKeeper()
        for host in self.hosts.values():
            if host.alive and host.entry.node == node:
                host.keeper_died()

    def close(self) -> None:
        """Free what the processes have of this one: descriptors and memory."""
        for process in (*self.hosts.values(), *self.routers.values()):
            if process.alive:
                process.kill()
        for keeper in self.keepers.values():
            keeper.close()

    def start_router(self) -> None:
        self._started["router"] += 1
        name = f"r{self._started['router']}"
        self.routers[name] = SimRouter(name, self.node_of(name), self)

    def kill_router(self, router: SimRouter, *, back_s: float) -> None:
        self.log(f"{router.name} is killed")
        router.kill()
        del self.routers[router.name]
        self.clock.after(back_s, "Serve starts a trunk", self.start_router)

    def start_controller(self) -> None:
        self._started["controller"] += 1
        controller = SimController(f"c{self._started['controller']}", self)
        self.controllers = [c for c in self.controllers if c.alive] + [controller]
        self.registry.controller = controller

    def second_controller(self) -> bool:
        """Start a second controller, as if Ray took the living one for dead.

        Some trunks go on asking the old one. Returns False if there are too many already.
        """
        if self.registry.controller is None or len(self.controllers) > 2:
            return False
        self.log(f"{self.registry.controller.name} is taken for dead")
        self.start_controller()
        for router in self.routers.values():
            if self._rng.random() < 0.5:
                router.move_to(self.registry.controller)
        return True

    def controller_ends(self, controller: SimController, *, back_s: float = 0.2) -> None:
        self.log(f"{controller.name} ends")
        controller.kill()
        self.controllers = [one for one in self.controllers if one is not controller]
        if self.registry.controller is controller:
            self.registry.controller = None
            self.clock.after(back_s, "Ray restarts the controller", self.start_controller)

    def _attach(self) -> None:
        controller = self.registry.controller
        if controller is None or controller.control is None or not controller.control.settled:
            self.clock.after(0.1, "a trunk attaches its model", self._attach)
            return
        for shape in self.settings.models:
            if shape.model in self.settings.in_memory:
                controller.adopt(shape)
                for name, host in self.hosts.items():
                    host.add_models([shape])
                    for key in controller.control.wanted(name):
                        if key.model == shape.model:
                            one = ExpertVersion(key, FIRST_VERSION)
                            host.put(one, tensors_of(one, CHECKPOINT))


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedRun:
    """The result of one simulation."""

    seed: int
    events: int
    calls: int  # layer calls that trunks made
    simulated_s: float
    faults: Mapping[str, int]  # by kind
    violation: Violation | None
    lines: tuple[str, ...]  # the last events
    digest: str  # of the log of all events


@contextmanager
def quiet() -> Iterator[None]:
    """Let the shells log nothing: what they complain of are the faults that are injected."""
    logger = logging.getLogger("moesaic.actors")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_seed(seed: int, *, faults_s: float = FAULTS_S) -> SeedRun:
    """Simulate a small pool under ``faults_s`` seconds of faults; a seed always does the same."""
    with quiet():
        world = World(seed)
        try:
            violation = world.run(faults_s)
        finally:
            world.close()
    return SeedRun(
        seed=seed,
        events=world.clock.happened,
        calls=world.calls,
        simulated_s=world.clock.now,
        faults=dict(sorted(world.network.tally.faults.items())),
        violation=violation,
        lines=tuple(world.lines),
        digest=world.digest,
    )
