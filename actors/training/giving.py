"""Gradients that a trunk's process gives to their owners."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from torch import Tensor

from ...cluster.expert_keys import ExpertKey
from ...cluster.placement import HostEntry
from ...cluster.training.contributions import Attempt
from ...cluster.training.orders import BulkKey
from ...cluster.training.run_plan import RunPlan
from ..transport.bulk.lent_memory import LentMemory
from ..transport.bulk.links import BulkLinks

# How long a host may take to take one message, or one tensor.
GIVE_S = 120.0


class GivenGradients:
    """Gradients lie in memory where hosts of this node read them; others get copies."""

    def __init__(
        self, plan: RunPlan, source: str, links: BulkLinks, threads: ThreadPoolExecutor
    ) -> None:
        """Hosts know them as those of ``source``; ``threads`` give them away."""
        trained = plan.tensors.values()
        # In an exact run gradients are float64, and masters may be float32.
        self._nbytes = sum(one.nbytes for one in trained) * (2 if plan.exact else 1)
        self._count = sum(len(one.groups) for one in trained)
        self._source = source
        self._links = links
        self._threads = threads
        self._readers: set[tuple[str, int]] = set()  # (host, incarnation), of this memory
        self.memory = LentMemory(self._nbytes, self._count)

    def give(
        self,
        attempt: Attempt,
        gradients: Mapping[ExpertKey, Mapping[str, Tensor]],
        owning: Callable[[ExpertKey], Sequence[HostEntry]],
    ) -> list[Future[None]]:
        """Begin to give gradients to their owners.

        The caller leaves them as they are until they `may_be_overwritten`. Raises ClusterError if
        memory for them is short.
        """
        for_host: dict[HostEntry, dict[BulkKey, Mapping[str, Tensor]]] = {}
        for key, tensors in gradients.items():
            lying = self.memory.hold(key, tensors)
            given = BulkKey("gradient", key, attempt=attempt, source=self._source)
            for entry in owning(key):
                for_host.setdefault(entry, {})[given] = lying
        begun: list[Future[None]] = []
        for entry, named in for_host.items():
            if self._links.is_near(entry):
                self._readers.add((entry.host, entry.incarnation))
                lend = partial(self._links.lend, entry, named, self.memory, timeout_s=GIVE_S)
                begun.append(self._threads.submit(lend))
                continue
            for given, tensors in named.items():
                put = partial(self._links.put, entry, given, tensors, timeout_s=GIVE_S)
                begun.append(self._threads.submit(put))
        return begun

    def may_be_overwritten(self, members: frozenset[tuple[str, int]]) -> bool:
        """Return whether no host still reads what was given.

        ``members`` have begun the next attempt, and so forgotten what they were given for another.
        """
        return self._readers <= members

    def move(self) -> None:
        """Let the next gradients lie in other memory; hosts may still read this one."""
        self.memory.close()
        self.memory = LentMemory(self._nbytes, self._count)
        self._readers.clear()

    def close(self) -> None:
        self.memory.close()
