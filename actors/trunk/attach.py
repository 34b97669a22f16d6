"""Moves the experts of a model in memory into the pool, over the weights channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from ...cluster.expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion
from ...cluster.placement import ModelRef, ModelShape
from ...models.training.trainable_trunk import trainable_trunk_of
from ...models.trunk.adapters import needs_adapter
from ...models.trunk.describe import experts_per_token
from ...models.trunk.experts_layers import (
    ExpertsLayer,
    expert_bytes,
    expert_parameters,
    expert_tensors,
    experts_layers,
    shared_parameters,
)
from ...models.trunk.in_pool import IMPLEMENTATION
from ...models.trunk.trainable import check_trainable
from ...models.trunk.trunk import meta_model, strip_experts
from ...proto.errors import UnsupportedModel
from ...proto.keys import ClusterSecret
from ...proto.wire import DTYPE_TO_WIRE
from ..engine.trunk_config import TrunkConfig
from ..host.weight_grants import Granted
from ..runtime.ray_border import controller_of, ray_get
from ..store.cluster_secret import secret_of
from ..transport.grpc.weights import put_weights
from .trunk import PoolTrunk

PUT_TIMEOUT_S = 60.0


def attach_model(
    model: PreTrainedModel,
    *,
    namespace: str,
    name: str,
    replicas: int,
    exact: bool,
    train: bool,
    make_config: Callable[[ModelRef], TrunkConfig],
) -> PoolTrunk:
    """Send the experts to the pool, free them in this process, and connect the model.

    The model stays as it was until all experts are in the pool. Raises UnsupportedModel and
    ClusterError.
    """
    if needs_adapter(model):
        raise UnsupportedModel(
            f"{type(model).__name__}: experts of this architecture can only be served from a "
            "checkpoint; save it with save_pretrained and use Cluster.from_pretrained"
        )
    if train:
        check_trainable(model)
    layers = experts_layers(model)
    dtypes = {
        one.dtype
        for layer in layers
        for _, one in (*expert_parameters(layer), *shared_parameters(layer))
    }
    dtype = next(iter(dtypes))
    if len(dtypes) > 1 or dtype not in DTYPE_TO_WIRE:
        raise UnsupportedModel(f"dtype: experts of {sorted(map(str, dtypes))} cannot be served")
    if not model._can_set_experts_implementation():
        raise UnsupportedModel(
            f"{type(model).__name__}: transformers cannot replace the implementation of this "
            "model's experts"
        )
    ref = ModelRef(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        config=model.config.to_dict(),
        learns=train,
    )
    shape = ModelShape(
        model=name,
        experts={layer.layer: layer.num_experts for layer in layers},
        replicas=replicas,
        exact=exact,
        expert_bytes=max(expert_bytes(layer, dtype) for layer in layers),
        experts_per_token=experts_per_token(model.config, layers[0]),
    )
    controller = controller_of(namespace)
    wanted: list[Granted] = ray_get(
        controller.add_model.remote(ref, shape), 60.0, "adding the model"
    )
    secret = secret_of(namespace)
    by_number = {la.layer: la for la in layers}
    for granted in wanted:
        _send(granted, secret, by_number)
    frozen = {
        (layer.layer, layer.pool_name(name))
        for layer in layers
        for name, parameter in (*expert_parameters(layer), *shared_parameters(layer))
        if not parameter.requires_grad
    }
    strip_experts(model)
    model.set_experts_implementation(IMPLEMENTATION)
    if not train:
        return PoolTrunk(make_config(ref), model, layers)
    trunk = PoolTrunk(
        make_config(ref), model, experts_layers(meta_model(model.config)), learns=True
    )
    for one in trainable_trunk_of(model).stand_ins:
        one.parameter.requires_grad_((one.layer, one.name) not in frozen)
    return trunk


def _send(granted: Granted, secret: ClusterSecret, layers: Mapping[int, ExpertsLayer]) -> None:
    proof = secret.proof("weights", granted.entry.target)

    def put(key: ExpertKey, tensors: Mapping[str, torch.Tensor]) -> None:
        put_weights(
            granted.entry.grpc_address,
            ExpertVersion(key, FIRST_VERSION),
            tensors,
            timeout_s=PUT_TIMEOUT_S,
            grant=granted.grant(ExpertVersion(key, FIRST_VERSION)),
            proof=proof,
        )

    for key, _ in granted.experts:
        put(key, expert_tensors(layers[key.layer], key.expert))
