"""The owner of a simulated cluster: it starts and ends hosts as the controller wants them.

It takes the place of `actors/controller/host_provisioner.py`; the `World` takes the place of Ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .clock import SimProcess
from .host import SimHost
from .network import Answered, Responder, Result
from .trace_events import HostEnded, HostStarted

if TYPE_CHECKING:
    from .world import World

_ASK_EVERY_S = 0.3
_ASK_TIMEOUT_S = 1.0


class SimOwner(SimProcess):
    """The owner's process, which asks the controller periodically for the hosts it wants."""

    def __init__(self, world: World, hosts: Iterable[str]) -> None:
        """Start with ``hosts``, which are there from the beginning."""
        super().__init__("owner", world.clock)
        self._world = world
        self.asked: set[str] = set()  # hosts started and not ended; some are still starting
        for name in hosts:
            self._ask_for(name)
            self._come(name)
        self.alarm("asks", _ASK_EVERY_S, self._ask)

    def _ask(self) -> None:
        controller = self._world.registry.controller

        def desired(respond: Responder) -> None:
            assert controller is not None
            controller.desired(respond)

        self._world.network.call(
            self,
            controller,
            "the owner asks for its hosts",
            desired,
            self._follow,
            timeout_s=_ASK_TIMEOUT_S,
        )

    def _follow(self, result: Result) -> None:
        self.alarm("asks", self.clock.now + _ASK_EVERY_S, self._ask)
        if not isinstance(result, Answered):
            return
        assert isinstance(result.value, tuple)
        desired = set(result.value)
        for name in sorted(self.asked - desired):
            self.asked.discard(name)
            self._end(name)
        for name in sorted(desired - self.asked):
            self._ask_for(name)
            # Ray starts the host even if the owner freezes meanwhile.
            start_s = self._world.faults.start_s(self._world.settings.start_s)
            self.clock.after(start_s, f"{name} starts", lambda name=name: self._come(name))

    def _ask_for(self, name: str) -> None:
        self.asked.add(name)
        self._world.tell(HostStarted(name, len(self.asked)))

    def _come(self, name: str) -> None:
        if name in self.asked:
            self._world.hosts[name] = SimHost(name, 1, self._world)

    def _end(self, name: str) -> None:
        host = self._world.hosts.pop(name, None)
        if host is not None:
            self._world.log(f"{host.name} is ended")
            self._world.tell(
                HostEnded(host, frozenset(host.weights) if host.alive else frozenset())
            )
            self._world.keepers[host.entry.node].leave(host, self.clock.now)
            host.kill()
