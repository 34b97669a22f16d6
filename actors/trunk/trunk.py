"""A trunk in this process: a model without its experts, and the router to them.

The Serve replica of a model has one, and `Cluster.from_pretrained` and `Cluster.attach` make one in
the user's own process.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...models.folder.tokenizer import read_tokenizer
from ...models.training.trainable_trunk import TrainableTrunk
from ...models.trunk.config import read_config, torch_dtype
from ...models.trunk.describe import describe_model
from ...models.trunk.experts_layers import ExpertsLayer, experts_layers, forms_anywhere
from ...models.trunk.routing_record import record_routing
from ...models.trunk.trainable import check_trainable
from ...models.trunk.trunk import (
    connect_experts,
    disconnect_experts,
    forward_modules,
    load_trunk,
    meta_model,
)
from ...proto.errors import ClusterError
from ..engine.engine import Engine, EngineConfig
from ..engine.transformers_backend.engine import TransformersEngine
from ..engine.trunk_config import TrunkConfig
from ..router.pool_link import PoolLink
from ..router.router import Router
from ..router.whole_calls import PassCheck
from ..runtime.devices import pick_device, take_for_trunk
from ..training.learning import Learning


def run_in_steps(module: nn.Module, router: Router, *, may_repeat: bool = True) -> None:
    """Make each forward of a module a pass of the router, which it may run a second time."""

    def begin(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        # Only a cache whose places are fixed, as the engine's is, may be written to twice.
        repeats = may_repeat and given.get("past_key_values") is None
        router.begin_step(PassCheck.DEVICE if repeats else PassCheck.CALLS)

    def end(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> Any:
        try:
            if out is not None and not router.step_is_sound():  # it is None after an error
                with router.repeating():
                    out = module.forward(*args, **given)
            return out
        finally:
            router.end_step()

    module.register_forward_pre_hook(begin, with_kwargs=True)
    module.register_forward_hook(end, with_kwargs=True, always_call=True)


class PoolTrunk:
    """A model connected to the pool; `close` disconnects it and frees everything."""

    def __init__(
        self,
        config: TrunkConfig,
        model: PreTrainedModel,
        layers: list[ExpertsLayer],
        *,
        learns: bool = False,
    ) -> None:
        """With ``learns`` gradients go through the pool: `learning` says to which step.

        ``layers`` are those of the model with its experts, as of the meta model.
        """
        self.config = config
        self.model = model
        self.layers = layers
        self.learning: Learning | None = None
        name = config.model.name
        numbers, forms = [layer.layer for layer in layers], forms_anywhere(layers)
        self._link = PoolLink(config, numbers, model.device, forms)
        self.router = self._link.router
        self._trainable: TrainableTrunk | None = None
        if learns:
            dtype = torch_dtype(config.model.dtype)
            self._trainable = TrainableTrunk(model, layers, dtype)
            self.learning = Learning(self.router, name, dtype)
            connect_experts(model, layers, self.learning.layer)
            self.learning.watch(model)
            record_routing(model)
        else:
            connect_experts(model, layers, lambda layer: self.router.experts(name, layer))
        for module in forward_modules(model):
            run_in_steps(module, self.router, may_repeat=not learns)

    def close(self) -> None:
        try:
            if self._trainable is not None:
                self._trainable.close()
            disconnect_experts(self.model)
        finally:
            self._link.close()


def open_trunk(
    config: TrunkConfig, *, learns: bool = False, dtype: torch.dtype | None = None
) -> PoolTrunk:
    """Load a trunk from its folder and connect it. Raises CheckpointError and ClusterError.

    One that ``learns`` is in training mode, and its parameters need gradients. ``dtype`` is the
    trunk's own (None: as the experts').
    """
    if config.model.path is None:
        raise ClusterError(
            f"model {config.model.name!r} was attached from memory; only the process that attached "
            "it has its trunk"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path = Path(config.model.path)
    dtype, device = dtype or torch_dtype(config.model.dtype), pick_device(config.device)
    model_config = read_config(path)
    meta = meta_model(model_config)
    layers = experts_layers(meta)
    if device.type == "cuda":
        sizes = describe_model(path, model_config, meta, dtype)
        cache = config.cache_bytes(sizes.cache_token_bytes)
        take_for_trunk(device, config.share, sizes.trunk_bytes + cache)
    model = load_trunk(path, dtype=dtype, device=device)
    if learns:
        check_trainable(model)
        model.train().requires_grad_(True)
    return PoolTrunk(config, model, layers, learns=learns)


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


def open_engine(config: TrunkConfig) -> Engine:
    """Open a trunk with an engine of its own, in the process of a replica."""
    # The controller tells routers apart by name, so each replica needs a name of its own.
    own = replace(config, name=f"{config.name}-{secrets.token_hex(3)}")
    if config.engine_kind == "vllm":
        from ..engine.vllm_backend.engine import VllmEngine

        return VllmEngine(own)
    return _PoolEngine(
        open_trunk(own),
        config.engine,
        lambda: read_tokenizer(config.model.path or ""),
    )
