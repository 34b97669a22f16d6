"""The controller's grants: a host refuses weights that a client puts into it without one.

A grant names one expert, one incarnation of one host, and the controller's term. A host refuses a
grant for anything else, and any grant of an older term than that of the newest controller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...cluster.expert_keys import FIRST_VERSION, SHARED, ExpertVersion
from ...cluster.placement import HostEntry, ModelRef
from ...proto.keys import ClusterSecret, Grant


@dataclass(frozen=True, slots=True)
class Granted:
    """Grants for the experts that one host is to hold, and for their layers' shared tensors."""

    entry: HostEntry
    term: int
    proofs: Mapping[ExpertVersion, bytes] = field(repr=False)

    @property
    def experts(self) -> list[ExpertVersion]:
        return [one for one in self.proofs if one.key.expert != SHARED]

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
    proofs: dict[ExpertVersion, bytes] = {}
    for one in wanted:
        shared = ExpertVersion(one.key._replace(expert=SHARED), FIRST_VERSION)
        for granted in (shared, one):
            if granted not in proofs:
                proofs[granted] = secret.grant(entry.host, entry.incarnation, *granted, term)
    return Granted(entry, term, proofs)
