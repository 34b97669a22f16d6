"""Sends new weights of experts into a running pool, has them served, and reads those that are."""

from __future__ import annotations

import getpass
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ray
from torch import Tensor

from ...cluster.expert_keys import ExpertKey, ExpertVersion
from ...cluster.placement import ModelRef
from ...cluster.reports.updates import WeightUpdateReport
from ...cluster.update_folder import UpdateFolder
from ...models.folder.expert_file import write_experts
from ...models.trunk.checkpoint import Checkpoint
from ...models.trunk.config import config_from_dict, read_config, torch_dtype
from ...models.trunk.expert_tensors import ExpertTensors
from ...models.trunk.experts_layers import experts_layers
from ...models.trunk.trunk import meta_model
from ...proto.errors import (
    CheckpointError,
    ClusterError,
    MoesaicError,
    describe_error,
)
from ...proto.keys import ClusterSecret
from ..host.weight_grants import BegunUpdate, Granted, LocatedExpert
from ..runtime.ray_border import controller_of, ray_get
from ..store.cluster_secret import secret_of
from ..transport.grpc.weights import get_weights, put_weights
from .attach import PUT_TIMEOUT_S

# More than the controller takes beyond the time that it is given.
_ANSWER_S = 60.0
_ABANDON_S = 5.0  # for it to hear that an update has failed
# An expert whose hosts are gone or full is soon on another one: for how long it is read again,
# and how often the controller is asked.
_READ_S = 60.0
_ASK_S = 0.2


def named_tensors(ref: ModelRef) -> ExpertTensors:
    """Return how the experts of a model are named in its checkpoint.

    Raises CheckpointError, also if the model's folder is not on this machine.
    """
    dtype = torch_dtype(ref.dtype)
    if ref.path is None:
        model = meta_model(config_from_dict(dict(ref.config)))
        layers = {layer.layer: layer for layer in experts_layers(model)}
        return ExpertTensors.in_memory(model, layers, dtype)
    folder = Path(ref.path)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: the folder of {ref.name} is not on this machine; run this on a machine of "
            "the cluster"
        )
    tensors = Checkpoint(folder, read_config(folder), dtype=dtype).tensors
    return replace(tensors, where="the tensors")


def update_experts(
    namespace: str,
    experts: Mapping[ExpertKey, Mapping[str, Tensor]],
    *,
    timeout_s: float = 600.0,
) -> WeightUpdateReport:
    """Replace the weights of experts of one model, all at once.

    ``experts`` has the tensors of each in the form of `expert_tensors`, in the model's dtype.
    Requests that are running go on with the new weights from one forward pass to the next. The
    update waits while a host of an expert is being replaced or still holds an older version. Raises
    CallError for tensors that do not fit or are not finite, and ClusterError; nothing has changed
    then.
    """
    controller, until = controller_of(namespace), time.monotonic() + timeout_s
    begun: BegunUpdate = ray_get(
        controller.begin_update.remote(list(experts), getpass.getuser(), timeout_s),
        _ANSWER_S,
        "beginning the update",
    )
    (model,) = {key.model for key in experts}
    folder = None if begun.folder is None else UpdateFolder(begun.folder, model)
    try:
        secret, granted = secret_of(namespace), begun.granted
        for key, tensors in experts.items():
            weights = ExpertVersion(key, begun.number)
            while failure := _put(granted, secret, weights, tensors):
                if time.monotonic() >= until:
                    raise ClusterError(f"{key} cannot be updated within {timeout_s:g} s: {failure}")
                time.sleep(_ASK_S)
                granted = ray_get(
                    controller.grant_update.remote(model, begun.number),
                    _ANSWER_S,
                    "asking where the weights can go",
                )
        if folder is not None:
            by_place = {(key.layer, key.expert): tensors for key, tensors in experts.items()}
            folder.write_weights(begun.number, lambda draft: write_experts(draft, by_place))
    except BaseException:
        # Another update is refused while this one is under way; it ends by itself later.
        ray.wait([controller.abandon_update.remote(model, begun.number)], timeout=_ABANDON_S)
        raise
    left_s = max(until - time.monotonic(), 1.0)
    return ray_get(
        controller.serve_update.remote(model, begun.number, left_s),
        left_s + _ANSWER_S,
        "serving the update",
    )


def revert_experts(namespace: str, model: str, *, timeout_s: float = 600.0) -> WeightUpdateReport:
    """Serve the weights from before a model's last update again. Raises ClusterError."""
    asked = controller_of(namespace).revert_update.remote(model, getpass.getuser(), timeout_s)
    return ray_get(asked, timeout_s + _ANSWER_S, "reverting the update")


def read_expert(namespace: str, key: ExpertKey) -> tuple[ModelRef, dict[str, Tensor]]:
    """Return the served weights of an expert in the form of `expert_tensors`, and its model.

    Raises ClusterError.
    """
    controller, secret = controller_of(namespace), secret_of(namespace)
    why, until = "no host holds it", time.monotonic() + _READ_S
    while True:
        located: LocatedExpert = ray_get(
            controller.locate_expert.remote(key), _ANSWER_S, "locating the expert"
        )
        for entry in located.holders:
            proof = secret.proof("weights", entry.target)
            try:
                tensors = get_weights(
                    entry.grpc_address,
                    located.weights,
                    timeout_s=PUT_TIMEOUT_S,
                    max_bytes=located.most_bytes,
                    proof=proof,
                )
            except MoesaicError as error:
                if not error.retryable:
                    raise
                why = f"{entry.host}: {describe_error(error)}"
            else:
                return located.ref, tensors
        if time.monotonic() >= until:
            raise ClusterError(f"{key} cannot be read within {_READ_S:g} s: {why}")
        time.sleep(_ASK_S)


def _put(
    granted: Sequence[Granted],
    secret: ClusterSecret,
    weights: ExpertVersion,
    tensors: Mapping[str, Tensor],
) -> str:
    """Put an expert into one host; the controller lets the others load it from there.

    Returns why no host took it, "" if one did. Raises MoesaicError where no host ever will.
    """
    failure = "no host serves it and has room"
    for one in granted:
        if weights not in one.proofs:
            continue
        try:
            put_weights(
                one.entry.grpc_address,
                weights,
                tensors,
                timeout_s=PUT_TIMEOUT_S,
                grant=one.grant(weights),
                proof=secret.proof("weights", one.entry.target),
            )
        except MoesaicError as error:
            if not error.retryable:
                raise
            failure = f"{one.entry.host}: {describe_error(error)}"
        else:
            return ""
    return failure
