"""Expert hosts as Ray actors, and the thread of the cluster's owner that starts and ends them.

The controller decides which hosts there are. The owner starts and ends them, so that every host
ends with the owner. Ray's own autoscaler counts an actor that waits for a machine as demand and a
machine without actors as idle, so it adds and removes nodes without being asked.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...cluster.scaling.node_choice import PlacedHost, PoolNode, choose_node
from ...cluster.spec.spec import HostGroup, Spec
from ...proto.errors import describe_error
from ..host.host_actor import RayExpertHost
from ..runtime.ray_border import actor_options

log = logging.getLogger(__name__)

# How long the controller may hold back an answer that changes nothing.
ASK_WAIT_S = 10.0
ASK_TIMEOUT_S = 13.0
PAUSE_S = 0.3
# For hosts that are ended; one that is frozen or still waits for a machine does not answer.
LEAVE_S = 1.0


class HostStarter:
    """Starts the hosts of one cluster."""

    def __init__(self, spec: Spec, namespace: str, threads: int) -> None:
        """Start nothing yet; a host whose group says ``threads: auto`` gets ``threads``."""
        self._spec = spec
        self._namespace = namespace
        self._threads = threads
        self._placed: dict[str, PlacedHost] = {}  # hosts whose machine was chosen here

    def start(self, name: str, group: int, strategy: Any = None) -> Any:
        """Start a host, and return its actor's handle; the actor may wait for a machine.

        ``strategy`` is Ray's; None: on the machines in turn.
        """
        wanted = self._spec.hosts[group]
        threads = self._threads if wanted.threads == "auto" else wanted.threads
        lends = self._spec.lending_of(wanted) != "never"
        return (
            ray.remote(RayExpertHost)
            .options(
                name=name,
                namespace=self._namespace,
                max_restarts=-1,
                max_concurrency=8,
                scheduling_strategy=strategy or self._strategy(name, wanted, stays=lends),
                **actor_options(wanted, threads),
            )
            .remote(
                name,
                cluster=self._spec.name,
                bind=self._spec.network.bind,
                device=wanted.device,
                limits=wanted.limits,
                threads=threads,
                transport=self._spec.network.transport,
                lends=lends,
                keep_s=self._spec.balance.host_timeout_s if lends else None,
                share=wanted.card_share(f"hosts.{group}", trains=self._spec.trains),
            )
        )

    def ended(self, name: str) -> None:
        self._placed.pop(name, None)

    def _strategy(self, name: str, wanted: HostGroup, *, stays: bool) -> Any:
        """Return a strategy that spreads hosts over machines.

        With ``stays`` the host's next process starts on the same machine, while that lives.
        """
        if not stays:
            return "SPREAD"
        reserved = {"CPU": wanted.num_cpus, "GPU": wanted.num_gpus, **wanted.resources}
        nodes = [
            PoolNode(node["NodeID"], node["Resources"], node.get("Labels") or {})
            for node in ray.nodes()
            if node["Alive"]
        ]
        chosen = choose_node(nodes, list(self._placed.values()), reserved, wanted.labels)
        if chosen is None:
            return "SPREAD"
        self._placed[name] = PlacedHost(chosen, reserved)
        # Another program may have taken the room: then the host starts elsewhere.
        return NodeAffinitySchedulingStrategy(chosen, soft=True, _spill_on_unavailable=True)


class HostProvisioner:
    """Asks the controller which hosts there should be, and starts and ends them.

    The thread survives every error. If it ended all the same, the controller would notice that
    nobody asks any more, and `status` would say so.
    """

    def __init__(self, starter: HostStarter, controller: Any, hosts: Mapping[str, Any]) -> None:
        self.hosts = dict(hosts)
        self._starter = starter
        self._controller = controller
        self._stop = threading.Event()
        self._turn = threading.Event()  # the controller has answered, or the keeper is closed
        self._thread = threading.Thread(target=self._run, name="host-keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all hosts, and stop following the controller."""
        self._stop.set()
        self._turn.set()
        self._thread.join(ASK_TIMEOUT_S)
        hosts, self.hosts = self.hosts, {}
        _end(list(hosts.values()))

    def _run(self) -> None:
        known: int | None = None
        lost = False  # whether the controller did not answer the last time
        while not self._stop.wait(PAUSE_S):
            try:
                self._turn.clear()
                asked = self._controller.desired.remote(known, ASK_WAIT_S)
                asked.future().add_done_callback(lambda _: self._turn.set())
                if not self._stop.is_set():
                    self._turn.wait(ASK_TIMEOUT_S)
                if self._stop.is_set():
                    return
                found: tuple[int, dict[str, int]] = ray.get(asked, timeout=0)
                self._follow(found[1])
                known = found[0]
                if lost:
                    log.info("the controller answers again")
                lost = False
            except RayError as error:
                known = None  # a restarted controller numbers its answers anew
                # Ray restarts the controller; hosts stay as they are.
                if not lost:
                    log.info(
                        "the controller does not answer: %s", describe_error(error).splitlines()[0]
                    )
                lost = True
            except Exception:
                # Whatever failed, the next round asks for the whole list again.
                known = None
                log.exception("hosts could not be started or ended")

    def _follow(self, desired: Mapping[str, int]) -> None:
        for name in self.hosts.keys() - desired.keys():
            _end([self.hosts.pop(name)])
            self._starter.ended(name)
            log.info("host %s is ended", name, extra={"host": name})
        for name in sorted(desired.keys() - self.hosts.keys()):
            if self._stop.is_set():
                return
            self.hosts[name] = self._starter.start(name, desired[name])
            log.info("host %s is started", name, extra={"host": name})


def _end(hosts: Sequence[Any]) -> None:
    """End hosts for good; those that answer free their memory at once."""
    if not hosts:
        return
    with ExitStack() as each:
        for host in hosts:
            each.callback(ray.kill, host, no_restart=True)
        ray.wait([host.leave.remote() for host in hosts], num_returns=len(hosts), timeout=LEAVE_S)
