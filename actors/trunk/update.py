"""Sends new weights of experts into a running pool, and has them served."""

from __future__ import annotations

import getpass
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from ...cluster.expert_keys import ExpertKey, ExpertVersion
from ...cluster.placement import PlacementId
from ...proto.errors import ClusterError, MoesaicError, describe_error
from ...proto.keys import ClusterSecret
from ..host.weight_grants import BegunUpdate, Granted
from ..runtime.cluster_secret import secret_of
from ..runtime.ray_border import controller_of, ray_get
from ..transport.grpc.weights import put_weights
from .attach import PUT_TIMEOUT_S

# More than the controller takes beyond the time that it is given.
_ANSWER_S = 20.0


def update_experts(
    namespace: str,
    experts: Mapping[ExpertKey, Mapping[str, Tensor]],
    *,
    timeout_s: float = 600.0,
) -> PlacementId:
    """Replace the weights of experts of one model, all at once; return the placement's number.

    ``experts`` has the tensors of each in the form of `expert_tensors`, in the model's dtype.
    Requests that are running go on with the new weights from one forward pass to the next. Raises
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
    try:
        secret = secret_of(namespace)
        for key, tensors in experts.items():
            _put(begun.granted, secret, ExpertVersion(key, begun.number), tensors)
    except BaseException:
        controller.abandon_update.remote(model, begun.number)
        raise
    left_s = max(until - time.monotonic(), 1.0)
    return ray_get(
        controller.serve_update.remote(model, begun.number, left_s),
        left_s + _ANSWER_S,
        "serving the update",
    )


def revert_experts(namespace: str, model: str, *, timeout_s: float = 600.0) -> PlacementId:
    """Serve the weights from before a model's last update again. Raises ClusterError."""
    asked = controller_of(namespace).revert_update.remote(model, getpass.getuser(), timeout_s)
    return ray_get(asked, timeout_s + _ANSWER_S, "reverting the update")


def _put(
    granted: Sequence[Granted],
    secret: ClusterSecret,
    weights: ExpertVersion,
    tensors: Mapping[str, Tensor],
) -> None:
    """Put an expert into one host; the controller lets the others load it from there."""
    last: MoesaicError | None = None
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
            return
        except MoesaicError as error:
            if not error.retryable:
                raise
            last = error
    why = "no host serves it and has room" if last is None else describe_error(last)
    raise ClusterError(f"{weights.key} cannot be updated: {why}; try again") from last
