"""Expert hosts as Ray actors, and the thread of the controller that starts and ends them.

Hosts belong to no process: they outlive the controller, whose successor finds them by their names.
Ray's own autoscaler counts an actor that waits for a machine as demand and a machine without actors
as idle, so it adds and removes nodes without being asked.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import ray
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from ...cluster.scaling.fleet import HOST_NAME
from ...cluster.scaling.node_choice import PlacedHost, PoolNode, choose_node
from ...cluster.spec.deployment import Deployment
from ...cluster.spec.spec import HostGroup, Spec
from ..host.host_actor import RayExpertHost
from ..runtime.placement_groups import reserved
from ..runtime.ray_border import actor_options, named_actors

log = logging.getLogger(__name__)

PAUSE_S = 0.3
# For hosts that are ended; one that is frozen or still waits for a machine does not answer.
LEAVE_S = 1.0


class HostStarter:
    """Starts the hosts of one cluster."""

    def __init__(
        self,
        deployment: Callable[[], Deployment],
        namespace: str,
        first: Mapping[str, int],
        nodes: Callable[[], Mapping[str, str]],
    ) -> None:
        """Start nothing yet.

        ``deployment`` returns what the cluster is to be now. ``first`` has the group of each host
        that the spec asked for at first, by name and in order: they take the places of the groups'
        placement groups. ``nodes`` returns the node of every host that is up.
        """
        self._deployment = deployment
        self._namespace = namespace
        self._places = _places(first)
        self._nodes = nodes
        self._chosen: dict[str, str] = {}  # the nodes that were chosen here

    def start(self, name: str, group: int, others: Mapping[str, int]) -> None:
        """Start a host beside ``others``, each with its group; it may wait for a machine."""
        deployment = self._deployment()
        spec, wanted = deployment.spec, deployment.groups[group]
        threads = _threads(spec) if wanted.threads == "auto" else wanted.threads
        lends = spec.lending_of(wanted) != "never"
        strategy = self._reserved(name, group) or self._strategy(name, wanted, others, stays=lends)
        (
            ray.remote(RayExpertHost)
            .options(
                name=name,
                namespace=self._namespace,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=8,
                scheduling_strategy=strategy,
                **actor_options(wanted, threads, deployment.log_environment),
            )
            .remote(
                name,
                cluster=spec.name,
                bind=spec.network.bind,
                device=wanted.device,
                limits=wanted.limits,
                threads=threads,
                transport=spec.network.transport,
                lends=lends,
                keep_s=spec.balance.host_timeout_s if lends else None,
                share=wanted.card_share(f"hosts.{group}", trains=spec.trains),
            )
        )

    def _reserved(self, name: str, group: int) -> Any:
        if (place := self._places.get(name)) is None:
            return None
        found = reserved(self._namespace, group)
        return None if found is None else PlacementGroupSchedulingStrategy(found, place)

    def _strategy(
        self, name: str, wanted: HostGroup, others: Mapping[str, int], *, stays: bool
    ) -> Any:
        """Return a strategy that spreads hosts over machines.

        With ``stays`` the host's next process starts on the same machine, while that lives.
        """
        if not stays:
            return "SPREAD"
        nodes = [
            PoolNode(node["NodeID"], node["Resources"], node.get("Labels") or {})
            for node in ray.nodes()
            if node["Alive"]
        ]
        at, groups = {**self._chosen, **self._nodes()}, self._deployment().groups
        placed = [
            PlacedHost(at[other], _needs(groups[group]))
            for other, group in others.items()
            if other in at and group in groups
        ]
        chosen = choose_node(nodes, placed, _needs(wanted), wanted.labels)
        if chosen is None:
            return "SPREAD"
        self._chosen[name] = chosen
        # Another program may have taken the room: then the host starts elsewhere.
        return NodeAffinitySchedulingStrategy(chosen, soft=True, _spill_on_unavailable=True)


class HostProvisioner:
    """Asks the controller's loop which hosts there should be, and starts and ends them.

    It has a thread, because Ray's calls block it while Ray's GCS is down. The thread survives every
    error. `status` reports a thread that has stopped asking.
    """

    def __init__(
        self,
        starter: HostStarter,
        namespace: str,
        desired: Callable[[int | None], tuple[int, dict[str, int]]],
    ) -> None:
        """Begin; ``desired`` returns a number and the group of every host there should be.

        Given the last number, it waits a while for another one.
        """
        self._starter = starter
        self._namespace = namespace
        self._desired = desired
        self._thread = threading.Thread(target=self._run, name="provisioner", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        known: int | None = None
        while True:
            time.sleep(PAUSE_S)
            try:
                number, desired = self._desired(known)
                if number != known:
                    self._follow(desired)
                known = number
            except Exception:
                # Whatever failed, the next round looks at all hosts again.
                known = None
                log.exception("hosts could not be started or ended")

    def _follow(self, desired: Mapping[str, int]) -> None:
        there = host_names(self._namespace)
        gone = there - desired.keys()
        end_hosts(self._namespace, sorted(gone))
        for name in sorted(gone):
            log.info("host %s is ended", name, extra={"host": name})
        for name in sorted(desired.keys() - there, key=_number):
            self._starter.start(
                name, desired[name], {n: g for n, g in desired.items() if n != name}
            )
            log.info("host %s is started", name, extra={"host": name})


def host_names(namespace: str) -> set[str]:
    """Return the names of all hosts of a cluster, whether or not they have started."""
    return {name for name in named_actors(namespace) if re.fullmatch(HOST_NAME, name)}


def end_hosts(namespace: str, names: Sequence[str]) -> None:
    """End hosts for good; those that answer free their memory at once."""
    hosts = [host for name in names if (host := _actor(name, namespace)) is not None]
    if not hosts:
        return
    with ExitStack() as each:
        for host in hosts:
            each.callback(ray.kill, host, no_restart=True)
        ray.wait([host.leave.remote() for host in hosts], num_returns=len(hosts), timeout=LEAVE_S)


def _actor(name: str, namespace: str) -> Any:
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None  # it has ended meanwhile


def _places(first: Mapping[str, int]) -> dict[str, int]:
    """Return each host's place among the hosts of its group."""
    places: dict[str, int] = {}
    counts: dict[int, int] = {}
    for name, group in first.items():
        places[name] = counts.setdefault(group, 0)
        counts[group] += 1
    return places


def _threads(spec: Spec) -> int:
    """Return each host's share of a node's cores, if hosts are spread evenly."""
    nodes = max(1, sum(1 for node in ray.nodes() if node["Alive"]))
    per_node = math.ceil(spec.num_hosts / nodes)
    return max(1, (os.cpu_count() or 1) // per_node)


def _needs(group: HostGroup) -> dict[str, float]:
    return {"CPU": group.num_cpus, "GPU": group.num_gpus, **group.resources}


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])
