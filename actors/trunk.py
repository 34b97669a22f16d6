"""A trunk in this process: a model without its experts, and the router to them.

Used inside the Serve replica that serves a model, and by `Cluster.from_pretrained` and
`Cluster.attach` in a user's own process.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cluster.health import RouterPolicy
from ..cluster.placement import LayerKey, Placement
from ..cluster.serving_spec import EngineKind
from ..cluster.transports import TransportChoice
from ..models.tokenizer import read_tokenizer
from ..models.trunk import (
    ExpertsLayer,
    connect_experts,
    disconnect_experts,
    experts_layers,
    load_trunk,
    meta_model,
    passes,
    read_config,
)
from ..proto.errors import ClusterError, in_words
from .cluster_secret import secret_of
from .device import pick_device
from .engine import Engine, EngineConfig
from .ray_border import CONTROLLER
from .router import Router
from .store import ModelRef
from .transformers_engine import TransformersEngine

log = logging.getLogger(__name__)

# How long the controller may keep a report that changes nothing.
WATCH_S = 1.0


class PlacementWatch:
    """A thread that tells the controller what its router counted and follows, and hands every new
    placement to the router; the controller may come and go."""

    def __init__(self, namespace: str, router: Router) -> None:
        self._namespace = namespace
        self._router = router
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="placement-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        # The thread may be in a long poll; it is a daemon and touches nothing once it has ended.
        self._thread.join(0.1)

    def _run(self) -> None:
        controller: Any = None
        while not self._stop.is_set():
            try:
                if controller is None:
                    controller = ray.get_actor(CONTROLLER, namespace=self._namespace)
                asked: Any = controller.report.remote(self._router.take_load(), WATCH_S)
                placement: Placement | None = ray.get(asked, timeout=WATCH_S + 5.0)  # pyright: ignore[reportAssignmentType]
            except (RayError, GetTimeoutError, ValueError) as error:
                # Routing goes on with the last placement.
                controller = None
                if not self._stop.is_set():
                    log.warning("no placements for now: %s", in_words(error).splitlines()[0])
                self._stop.wait(0.5)
                continue
            if placement is not None and not self._stop.is_set():
                self._router.place(placement)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkConfig:
    """What a process needs to open a trunk of the cluster; picklable."""

    namespace: str
    model: ModelRef
    name: str
    device: str = "auto"
    threads: int | None = None
    policy: RouterPolicy = field(default_factory=RouterPolicy)
    transport: TransportChoice = "auto"
    engine: EngineConfig = field(default_factory=EngineConfig)
    engine_kind: EngineKind = "transformers"
    start_s: float = 120.0


class PoolLink:
    """A router that follows the cluster's placements; both end with `close`."""

    def __init__(
        self, config: TrunkConfig, layers: Sequence[int], device: torch.device | None = None
    ) -> None:
        """Waits until ``layers`` of the model are placed. ``device`` is where its tensors are, if
        not where the config says. Raises ClusterError."""
        self.router = Router(
            name=config.name,
            node=ray.get_runtime_context().get_node_id(),
            policy=config.policy,
            transport=config.transport,
            device=device or pick_device(config.device),
            secret=secret_of(config.namespace),
        )
        self._watch: PlacementWatch | None = None
        try:
            self._watch = PlacementWatch(config.namespace, self.router)
            wanted = [LayerKey(config.model.name, layer) for layer in layers]
            self.router.wait_ready(config.start_s, wanted)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        try:
            if self._watch is not None:
                self._watch.close()
        finally:
            self.router.close()


class PoolTrunk:
    """A model connected to the pool; `close` disconnects it and frees everything."""

    def __init__(
        self, config: TrunkConfig, model: PreTrainedModel, layers: list[ExpertsLayer]
    ) -> None:
        self.model = model
        self._link = PoolLink(config, [layer.layer for layer in layers], model.device)
        self.router = self._link.router
        connect_experts(model, layers, lambda layer: self.router.experts(config.model.name, layer))
        for module in passes(model):
            module.register_forward_pre_hook(lambda *_: self.router.begin_step())

    def close(self) -> None:
        try:
            disconnect_experts(self.model)
        finally:
            self._link.close()


def open_trunk(config: TrunkConfig) -> PoolTrunk:
    """Load a trunk from its folder and connect it. Raises CheckpointError and ClusterError."""
    if config.model.path is None:
        raise ClusterError(
            f"model {config.model.name!r} was attached from memory; its trunk lives in the process "
            "that attached it"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path = Path(config.model.path)
    layers = experts_layers(meta_model(read_config(path)))
    model = load_trunk(path, dtype=config.model.torch_dtype, device=pick_device(config.device))
    return PoolTrunk(config, model, layers)


class _PoolEngine(TransformersEngine):
    """The transformers engine over a trunk of the pool, which it owns."""

    def __init__(
        self,
        trunk: PoolTrunk,
        config: EngineConfig,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
    ) -> None:
        super().__init__(trunk.model, config=config, tokenizer=tokenizer)
        self._trunk = trunk
        trunk.router.batch.owned_by(self)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._trunk.close()


def engine_factory(config: TrunkConfig) -> Callable[[], Engine]:
    """For `serve_app.Trunk`: builds the engine in the replica's own process."""

    def build() -> Engine:
        # Each replica is a router of its own to the controller.
        own = replace(config, name=f"{config.name}-{secrets.token_hex(3)}")
        if config.engine_kind == "vllm":
            from .vllm_engine import VllmEngine

            return VllmEngine(own)
        return _PoolEngine(
            open_trunk(own),
            config.engine,
            lambda: read_tokenizer(config.model.path or ""),
        )

    return build
