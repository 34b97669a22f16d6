"""A pool on Ray as a training run reaches it."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError

from ....cluster.expert_keys import ExpertKey, LayerKey
from ....cluster.placement import HostEntry, LayerPlacement, PlacementId
from ....cluster.training.orders import Answer, Order
from ....cluster.training.progress import RunProgress
from ....cluster.training.run_plan import PoolNow
from ....cluster.training.runs import NewsRequest, TrainingNews
from ....proto.errors import (
    HostGone,
    HostLost,
    InternalError,
    MoesaicError,
    NoAnswer,
    describe_error,
)
from ...runtime.ray_border import controller_of, last_line, ray_get

# For a question that the controller answers from what it knows.
ASK_S = 10.0
_CONNECT_S = 0.5


class RayTrainingPool:
    """A `TrainingPool`: the controller's and the hosts' actors."""

    def __init__(self, namespace: str, run: int, model: str) -> None:
        self._namespace = namespace
        self._run = run
        self._model = model
        self._placed: PlacementId | None = None
        self._holders: Mapping[ExpertKey, tuple[str, ...]] = {}
        self._entries: Mapping[str, HostEntry] = {}

    def now(self, skip: int | None = None, tells: RunProgress | None = None) -> PoolNow:
        asks = NewsRequest(self._run, skip, self._placed, tells)
        news: TrainingNews = ray_get(
            controller_of(self._namespace).training_news.remote(asks),
            ASK_S,
            "looking at the pool's hosts",
        )
        if news.placed is not None:
            self._placed, self._holders = news.placed, _holders(news.layers)
        self._entries = news.entries
        return PoolNow(
            entries=news.entries,
            domains=news.domains,
            holders=self._holders,
            leaving=news.leaving,
            old_versions=news.old_versions,
        )

    def order(
        self, orders: Mapping[str, Order], timeout_s: float
    ) -> dict[str, Answer | MoesaicError]:
        until = time.monotonic() + timeout_s
        asked = {host: self._ask(host, order) for host, order in orders.items()}
        return {host: self._answer(host, one, until) for host, one in asked.items()}

    def publish(self, version: int, timeout_s: float) -> PlacementId:
        return ray_get(
            controller_of(self._namespace).publish_training.remote(self._run, version, timeout_s),
            timeout_s + ASK_S,
            f"serving version {version} of {self._model}",
        )

    def end(self) -> None:
        controller = controller_of(self._namespace)
        ray_get(controller.end_training.remote(self._run), ASK_S, "ending the training run")

    def _ask(self, host: str, order: Order) -> Any:
        try:
            # Not kept: after a restart the handle of before would still answer for the one that
            # was.
            return ray.get_actor(host, namespace=self._namespace).train.remote(order)
        except ValueError as error:
            return HostLost(f"{host} is gone: {error}")

    def _answer(self, host: str, asked: Any, until: float) -> Answer | MoesaicError:
        if isinstance(asked, MoesaicError):
            return asked
        try:
            return ray.get(asked, timeout=max(until - time.monotonic(), 0))
        except GetTimeoutError:
            return NoAnswer(f"{host} has not answered in time")
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, MoesaicError):
                return cause
            return InternalError(f"{host}: {describe_error(cause)}")
        except RayError as error:
            # Ray does not tell whether an actor that it does not reach has ended.
            is_gone = isinstance(error, ActorDiedError) or self._refuses(host)
            return (HostGone if is_gone else HostLost)(f"{host}: {last_line(error)}")

    def _refuses(self, host: str) -> bool:
        """Return whether nothing listens any more where the host did; False if that is unknown."""
        entry = self._entries.get(host)
        if entry is None:
            return False
        name, _, port = entry.grpc_address.rpartition(":")
        try:
            socket.create_connection((name.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        except ConnectionRefusedError:
            return True
        except (OSError, ValueError):
            return False
        return False


def _holders(layers: Mapping[LayerKey, LayerPlacement]) -> dict[ExpertKey, tuple[str, ...]]:
    return {
        key.expert(expert): layer.hosts(expert)
        for key, layer in layers.items()
        for expert in range(len(layer.replicas))
    }
