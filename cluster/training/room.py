"""Where hosts have the memory that a run needs: for one more replica, and when others leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ..card_memory import gb
from .progress import RunParts


class TrainingHost(NamedTuple):
    """A host that stays in the pool."""

    node: str
    domain: str  # what fails with it
    free_bytes: int | None  # of its machine; None: unknown


def replicas_with_room(parts: RunParts, hosts: Mapping[str, TrainingHost]) -> dict[str, int]:
    """Return for how many more replicas each host's part of its machine's free memory suffices.

    A replica keeps two versions of the weights, and its gradient. Hosts whose machines are unknown
    are missing.
    """
    largest = parts.largest
    replica_bytes = max(1, 2 * largest.version + largest.added)
    on_node = Counter(host.node for host in hosts.values())
    return {
        name: host.free_bytes // on_node[host.node] // replica_bytes
        for name, host in hosts.items()
        if host.free_bytes is not None
    }


def shortage_without(
    parts: RunParts,
    leaving: Collection[str],
    replicas: int,
    staying: Mapping[str, TrainingHost],
) -> str:
    """Say why hosts cannot leave that own what a run trains; empty if they can.

    The others copy what those own, and take over their ``replicas``, before these forget it. So it
    has to fit beside what is there, also on the same machine.
    """
    if not staying:
        return "no host would be left"
    domains = {host.domain for host in staying.values()}
    if len(domains) <= parts.redundancy:
        return (
            f"the training run has redundancy {parts.redundancy}, which needs "
            f"{parts.redundancy + 1} failure domains"
        )
    owned_bytes = sum(owns.nbytes for host, owns in parts.owned.items() if host in leaving)
    largest = parts.largest
    moved_bytes = owned_bytes + replicas * (2 * largest.version + largest.added)
    # Who owns least gets the next key, so the parts of hosts are about even.
    part_bytes = moved_bytes // len(staying)
    on_node = Counter(host.node for host in staying.values())
    for name, host in sorted(staying.items()):
        need_bytes = part_bytes * on_node[host.node]
        if host.free_bytes is not None and need_bytes > host.free_bytes:
            return (
                f"the others take over {gb(moved_bytes)} that the training run keeps there, of "
                f"which {gb(need_bytes)} go to the machine of {name}, where "
                f"{gb(host.free_bytes)} are free"
            )
    return ""
