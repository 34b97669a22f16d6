"""An expert host as a Ray actor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ray
from ray.util import get_node_ip_address

from ...models.trunk.lean_imports import import_models
from ..runtime.low_priority_import import import_at_low_priority
from ..runtime.process_log import begin_process
from ..runtime.ray_border import namespace_of
from ..store.start_failures import recording_failure
from ..tracing.start import trace_if_wanted

if TYPE_CHECKING:
    # Ray imports this module at normal priority, so it must not import torch.
    from ...cluster.card_memory import CardShare
    from ...cluster.expert_keys import ExpertVersion
    from ...cluster.host.emulation import Emulation
    from ...cluster.host.residency import HostLimits
    from ...cluster.host_answers import HostAnswers
    from ...cluster.placement import HostEntry, ModelRef
    from ...cluster.routing.transports import TransportChoice
    from ...cluster.training.orders import Answer, Order
    from .report import HostReport, PlacedModel, Revision


class RayExpertHost:
    """The Ray actor that runs an `ExpertHost` on its node."""

    def __init__(
        self,
        name: str,
        *,
        cluster: str,
        bind: str,
        device: str,
        limits: HostLimits,
        threads: int,
        transport: TransportChoice,
        lends: bool = False,
        keep_s: float | None = None,
        share: CardShare | None = None,
    ) -> None:
        """Start the host.

        ``keep_s`` is how long its memory waits for a successor; None: not at all. ``share`` is the
        part of its GPU that it may take.
        """
        with recording_failure(namespace_of(cluster), "host", name):
            begin_process("host", name, cluster)
            # A restarting host shares its cores with processes that serve: low priority.
            import_at_low_priority(".host", __package__, first=import_models)
            from ..store.cluster_secret import secret_of
            from .host import ExpertHost
            from .memory.kept_memory import KeptMemory

            trace_if_wanted(namespace_of(cluster), "host", name, cluster)
            node, secret = ray.get_runtime_context().get_node_id(), secret_of(namespace_of(cluster))
            kept = None
            if keep_s is not None:
                # The parent of an actor's process is the node's raylet.
                kept = KeptMemory(
                    secret.keeper_address(node), name, keep_s=keep_s, parent_pid=os.getppid()
                )
            self._host = ExpertHost(
                name,
                node=node,
                bind=get_node_ip_address() if bind == "node" else bind,
                device=device,
                limits=limits,
                threads=threads,
                transport=transport,
                lends=lends,
                secret=secret,
                kept=kept,
                share=share,
            )

    def entry(self) -> HostEntry:
        return self._host.entry()

    def probe(self) -> HostAnswers:
        return self._host.probe()

    def load(
        self,
        models: Sequence[PlacedModel],
        wanted: Sequence[ExpertVersion],
        peers: Mapping[ExpertVersion, HostEntry] | None = None,
        *,
        term: int = 0,
    ) -> None:
        self._host.load(models, wanted, peers, term=term)

    def forget_model(self, ref: ModelRef, term: int) -> None:
        self._host.forget_model(ref, term)

    def add_models(self, models: Sequence[PlacedModel]) -> None:
        self._host.add_models(models)

    def release(self, gone: Sequence[ExpertVersion], term: int = 0, eviction: int = 1) -> None:
        self._host.release(gone, term, eviction)

    def train(self, order: Order) -> Answer:
        return self._host.train(order)

    def leave(self) -> None:
        self._host.leave()

    def emulate(self, device: Emulation | None) -> None:
        self._host.emulate(device)

    def report(
        self,
        term: int | None = None,
        given_up: int = 0,
        *,
        known: Revision | None = None,
        wait_s: float = 0.0,
    ) -> HostReport:
        return self._host.report(term, given_up, known=known, wait_s=wait_s)
