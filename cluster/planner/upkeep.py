"""What replicas of an expert cost while a run trains its model.

Each step brings the gradient of a replica to the expert's owners, and the new weights back. A host
that owns the expert has the new weights already, and one sum less to send. So a replica has to take
enough load off busy hosts, step by step, or it does not pay.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..expert_keys import LayerKey
from ..reports.placing import UpkeepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaUpkeep:
    """The upkeep of one more replica of an expert of the model that is trained."""

    model: str
    owners: Mapping[LayerKey, Sequence[Sequence[str]]]  # the hosts that own each expert of a layer
    elsewhere_bytes: int  # that a step moves for a replica on a host that does not own the expert
    at_owner_bytes: int  # the same on one of its owners
    bytes_per_s: float  # how fast these go from host to host
    step_s: float  # how long a step takes

    def __post_init__(self) -> None:
        for name, value in (("bytes_per_s", self.bytes_per_s), ("step_s", self.step_s)):
            if not value > 0:
                raise ValueError(f"{name}: {value}, but must be more than 0")

    def seconds(self, size_bytes: float) -> float:
        """Return how long each step moves so many bytes."""
        return size_bytes / self.bytes_per_s

    def busy(self, key: LayerKey, experts: int, names: Sequence[str]) -> np.ndarray | None:
        """Return the part of a host's time that each replica of a layer costs, (E, H).

        ``names`` are the hosts. None: the layer is of another model, and its replicas cost nothing.
        """
        if key.model != self.model:
            return None
        busy_EH = np.full((experts, len(names)), self.seconds(self.elsewhere_bytes) / self.step_s)
        index = {name: host for host, name in enumerate(names)}
        for expert, owners in enumerate(self.owners.get(key, ())):
            for owner in owners:
                if owner in index:
                    busy_EH[expert, index[owner]] = self.seconds(self.at_owner_bytes) / self.step_s
        return busy_EH if busy_EH.any() else None

    def report(self) -> UpkeepReport:
        return UpkeepReport(
            model=self.model,
            replica_bytes=self.elsewhere_bytes,
            replica_s=round(self.seconds(self.elsewhere_bytes), 6),
            step_s=round(self.step_s, 3),
        )
