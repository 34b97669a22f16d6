"""A client of the router service, which needs numpy and gRPC, and neither Ray nor torch.

Example:

    with RouterClient("moesaic://127.0.0.1:8001") as router:
        experts = router.experts("demo", 0)
        y_TH = experts(x_TH, ids_TK, weights_TK)

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import numpy as np

from ..actors.router_service.client_channel import RouterChannel
from ..proto.errors import CallError, Expired, MoesaicError, RequestError, UnknownModel
from ..proto.expert_pb2 import DType
from ..proto.router_pb2 import ComputeHead, ModelsReply
from ..proto.router_wire import RouterLayout
from .retry import RETRIES, Retries
from .router_keys import key_for

__all__ = ["RouterClient", "RouterLayer", "RouterModel"]

TIMEOUT_S = 60.0
SCHEME = "moesaic"

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterLayer:
    layer: int
    experts: int
    hidden: int
    max_top_k: int  # assignments that a token may have


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterModel:
    name: str
    dtype: str  # of hidden states and answers: "float32", "bfloat16", "float16"
    exact: bool  # answers do not depend on placement or other calls, to the bit
    layers: tuple[RouterLayer, ...]


class Experts(Protocol):
    """One MoE layer: the weighted sum of each token's chosen experts."""

    def __call__(
        self,
        hidden: A,
        ids: Any,
        weights: Any,
        *,
        timeout_s: float | None = None,
        traceparent: str | None = None,
    ) -> A:
        """Compute the layer for the tokens ``hidden``.

        ``hidden`` (T, H) has the model's dtype, ``ids`` (T, K) whole numbers, of which -1 is an
        unused assignment, ``weights`` (T, K) real numbers; all are arrays of numpy or torch.
        Returns (T, H) of hidden's kind, dtype and device. ``traceparent`` names the caller's span.

        Raises CallError for arguments that do not fit, Expired, Busy, ExpertUnavailable, BadExpert,
        HostLost and ClusterError.
        """
        ...


class RouterClient:
    """A thread-safe client of one router service.

    Calls that may succeed on another try are retried up to ``retries`` times, after random pauses,
    as long as ``timeout_s`` allows.
    """

    def __init__(
        self,
        target: str,
        *,
        key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
    ) -> None:
        """Set the service's address; the first call connects.

        ``target`` is moesaic://host:port. ``key`` is the service's key (default: that of a cluster
        of this user on this machine, or else MOESAIC_ROUTER_KEY of the environment). Raises
        RequestError, and Unauthenticated when there is no key.
        """
        self._timeout_s = timeout_s
        self._retries = retries
        self._known: ModelsReply | None = None
        address = _address(target)
        self._channel = RouterChannel(address, key or key_for(address))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def models(self) -> list[RouterModel]:
        self._known = self._tried(self._channel.models, time.monotonic() + self._timeout_s)
        return [
            RouterModel(
                name=model.name,
                dtype=DType.Name(model.dtype).lower(),
                exact=model.exact,
                layers=tuple(
                    RouterLayer(
                        layer=one.layer,
                        experts=one.experts,
                        hidden=one.hidden,
                        max_top_k=one.max_top_k,
                    )
                    for one in model.layers
                ),
            )
            for model in self._known.models
        ]

    def experts(self, model: str, layer: int) -> Experts:
        """Return a layer's experts. Raises UnknownModel, and CallError for a layer without any."""
        most_bytes = self._find(model, layer)

        def compute(
            hidden: A,
            ids: Any,
            weights: Any,
            *,
            timeout_s: float | None = None,
            traceparent: str | None = None,
        ) -> A:
            until = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
            x_TH, dtype, like_hidden = _hidden(hidden)
            ids_TK, weights_TK = _ids(ids), _weights(weights)
            _check_shapes(x_TH, ids_TK, weights_TK)
            head = ComputeHead(
                model=model,
                layer=layer,
                rows=1,
                hidden=x_TH.shape[1],
                top_k=ids_TK.shape[1],
                dtype=dtype,
            )
            at_once = max(1, most_bytes // RouterLayout.of(head).call_bytes)
            out_TH = np.empty_like(x_TH)
            for start in range(0, x_TH.shape[0], at_once):
                some = slice(start, start + at_once)
                rows = x_TH[some], ids_TK[some], weights_TK[some]
                out_TH[some] = self._compute(head, *rows, until, traceparent)
            return like_hidden(out_TH)

        return compute

    def _find(self, model: str, layer: int) -> int:
        """Return the most bytes that one call of a layer may have."""
        if self._known is None or all(one.name != model for one in self._known.models):
            self.models()
        assert self._known is not None
        found = next((one for one in self._known.models if one.name == model), None)
        if found is None:
            known = ", ".join(one.name for one in self._known.models) or "no model"
            raise UnknownModel(
                f"model: {model!r} is not served; the router service has {known}", param="model"
            )
        layers = [one.layer for one in found.layers]
        if layer not in layers:
            raise CallError(
                f"layer: layer {layer} of {model} has no experts; choose one of layers {layers}"
            )
        return self._known.max_call_bytes

    def _compute(
        self,
        head: ComputeHead,
        x_TH: np.ndarray,
        ids_TK: np.ndarray,
        weights_TK: np.ndarray,
        until: float,
        traceparent: str | None,
    ) -> np.ndarray:
        head.rows = x_TH.shape[0]
        layout = RouterLayout.of(head)
        data = np.empty(layout.call_bytes, dtype=np.uint8)
        data[: layout.weights_offset].view("<i4")[...] = ids_TK.reshape(-1)
        data[layout.weights_offset : layout.x_offset].view("<f4")[...] = weights_TK.reshape(-1)
        data[layout.x_offset :].view(x_TH.dtype)[...] = x_TH.reshape(-1)
        answer = self._tried(
            lambda left_s: self._channel.compute(head, data.data, left_s, traceparent), until
        )
        return np.frombuffer(answer, dtype=x_TH.dtype).reshape(x_TH.shape)

    def _tried(self, call: Callable[[float], R], until: float) -> R:
        """Call until it succeeds or may not be retried; ``call`` gets the seconds that are left."""
        tries = Retries(self._retries)
        while True:
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise Expired(
                    "the call did not succeed before its deadline; give it a larger timeout"
                )
            try:
                return call(left_s)
            except MoesaicError as error:
                pause_s = tries.pause_s(error)
                if time.monotonic() + pause_s >= until:
                    raise
            time.sleep(pause_s)


def _address(target: str) -> str:
    """Return host:port. Raises RequestError."""
    try:
        parts = urlsplit(target)
        port = parts.port
    except ValueError:
        port = None
        parts = urlsplit("")
    rest = parts.path or parts.query or parts.fragment or parts.username
    if parts.scheme != SCHEME or not parts.hostname or not port or rest:
        raise RequestError(
            f"target: {target!r} is not the address of a router service, {SCHEME}://HOST:PORT",
            param="target",
        )
    return parts.netloc


def _is_torch(given: Any) -> bool:
    """Return whether it is a tensor, without importing torch: whoever has one has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(given, torch.Tensor)


def _hidden(given: A) -> tuple[np.ndarray, str, Callable[[np.ndarray], A]]:
    """Prepare hidden states for sending.

    Returns an array whose bytes can be sent, the wire's name of its dtype, and a function that
    turns an answer into the kind of array that was given.
    """
    if not _is_torch(given):
        array = np.asarray(given)
        if array.dtype.name not in ("float32", "float16"):
            raise CallError(
                f"hidden: an array of numpy's {array.dtype.name} cannot be sent; convert it to "
                "float32 or float16, or give a torch tensor of bfloat16"
            )
        little: Any = array.dtype.newbyteorder("<")
        back: Any = lambda out: out.astype(array.dtype, copy=False)  # noqa: E731
        return array.astype(little, copy=False), array.dtype.name.upper(), back
    tensor: Any = given
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise CallError(
            f"hidden: a tensor of torch's {name} cannot be sent; convert it to float32, bfloat16 "
            "or float16"
        )
    torch = sys.modules["torch"]
    plain = tensor.detach().cpu().contiguous()
    # numpy has no bfloat16, so its bytes are sent as integers.
    sent = (plain.view(torch.int16) if name == "bfloat16" else plain).numpy()

    def like_given(out: np.ndarray) -> Any:
        return torch.from_numpy(out).view(tensor.dtype).to(tensor.device)

    return sent, name.upper(), like_given


def _ids(given: Any) -> np.ndarray:
    array = given.detach().cpu().numpy() if _is_torch(given) else np.asarray(given)
    if array.dtype.kind not in "iu":
        raise CallError(f"ids: the array has dtype {array.dtype.name}; give integers")
    bounds = np.iinfo(np.int32)
    if array.size and (array.min() < bounds.min or array.max() > bounds.max):
        raise CallError(
            "ids: an expert's number does not fit into 32 bits; give the numbers of experts"
        )
    return array.astype(np.int32, copy=False)


def _weights(given: Any) -> np.ndarray:
    array = given.detach().cpu().float().numpy() if _is_torch(given) else np.asarray(given)
    if array.dtype.kind not in "fiu":
        raise CallError(f"weights: the array has dtype {array.dtype.name}; give real numbers")
    return array.astype(np.float32, copy=False)


def _check_shapes(x_TH: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray) -> None:
    """Check that the shapes fit each other. Raises CallError."""
    if x_TH.ndim != 2:
        raise CallError(f"hidden: the shape is {x_TH.shape}; give (tokens, hidden size)")
    for name, array in (("ids", ids_TK), ("weights", weights_TK)):
        if array.ndim != 2 or array.shape != (x_TH.shape[0], ids_TK.shape[-1]):
            raise CallError(
                f"{name}: the shape is {array.shape} for {x_TH.shape[0]} tokens; give ids and "
                "weights of the same shape, (tokens, experts per token)"
            )
