"""What a process needs to know to open a trunk of a cluster.

It is read in a trunk's new process before torch and transformers are imported there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from ...cluster.card_memory import CardShare, cached_bytes
from ...cluster.placement import ModelRef
from ...cluster.routing.policy import RouterPolicy
from ...cluster.routing.transports import TransportChoice
from ...cluster.spec.parts import EngineKind
from .engine import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkConfig:
    """Everything that a process needs to open a trunk of the cluster; picklable."""

    namespace: str
    model: ModelRef
    name: str
    device: str = "auto"
    threads: int | None = None
    policy: RouterPolicy = field(default_factory=RouterPolicy)
    transport: TransportChoice = "auto"
    engine: EngineConfig = field(default_factory=EngineConfig)
    engine_kind: EngineKind = "transformers"
    lending: bool = False  # hosts of this machine may lend their experts' memory
    start_s: float = 120.0
    share: CardShare = field(default_factory=partial(CardShare, key="trunk"))  # of its GPU

    def cache_bytes(self, token_bytes: int) -> int:
        """Return the size of the engine's key-value cache; 0 if no size is set."""
        return cached_bytes((self.engine.num_blocks or 0) * self.engine.page_size, token_bytes)
