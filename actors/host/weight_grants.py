"""The controller's grants: a host refuses weights that a client puts into it without one.

A grant names one expert, one incarnation of one host, and the controller's term. A host refuses a
grant for anything else, and any grant of an older term than that of the newest controller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...cluster.placement import SHARED, ExpertKey, HostEntry
from ...proto.keys import ClusterSecret, Grant

VERSION = 1


@dataclass(frozen=True, slots=True)
class Granted:
    """Grants for the experts that one host is to hold, and for their layers' shared tensors."""

    entry: HostEntry
    term: int
    proofs: Mapping[ExpertKey, bytes] = field(repr=False)

    @property
    def experts(self) -> list[ExpertKey]:
        return [key for key in self.proofs if key.expert != SHARED]

    def grant(self, key: ExpertKey) -> Grant:
        return Grant(self.term, self.proofs[key])


def grant_all(
    secret: ClusterSecret, entry: HostEntry, keys: Iterable[ExpertKey], term: int
) -> Granted:
    proofs: dict[ExpertKey, bytes] = {}
    for key in keys:
        for granted in (key._replace(expert=SHARED), key):
            if granted not in proofs:
                proofs[granted] = secret.grant(
                    entry.host, entry.incarnation, granted, VERSION, term
                )
    return Granted(entry, term, proofs)
