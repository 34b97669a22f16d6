"""The controller's grants: a host refuses weights that a client puts into it without one.

A grant names one expert, one incarnation of one host, and the controller's term. A host refuses a
grant for anything else, and any grant of an older term than that of the newest controller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...cluster.expert_keys import ExpertVersion
from ...cluster.placement import HostEntry, ModelRef
from ...proto.keys import ClusterSecret, Grant


@dataclass(frozen=True, slots=True)
class Granted:
    """Grants for the experts that one host is to hold."""

    entry: HostEntry
    term: int
    proofs: Mapping[ExpertVersion, bytes] = field(repr=False)

    @property
    def experts(self) -> list[ExpertVersion]:
        return list(self.proofs)

    def grant(self, weights: ExpertVersion) -> Grant:
        return Grant(self.term, self.proofs[weights])


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunUpdate:
    """An update whose weights may be put into hosts now."""

    number: int
    granted: Sequence[Granted]  # each host that serves some of the experts, with its grants
    folder: str | None  # where its weights are to be written, if its model has such a folder


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedExpert:
    """Where the served weights of an expert are."""

    weights: ExpertVersion
    holders: Sequence[HostEntry]
    ref: ModelRef  # its model
    most_bytes: int  # of its safetensors file


def grant_all(
    secret: ClusterSecret, entry: HostEntry, wanted: Iterable[ExpertVersion], term: int
) -> Granted:
    proofs = {one: secret.grant(entry.host, entry.incarnation, *one, term) for one in wanted}
    return Granted(entry, term, proofs)
