"""Ask a cluster's controller from the ingress: its status, and what the page shows and does."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
from pydantic import BaseModel
from ray.exceptions import RayError, RayTaskError

from ....cluster.metrics.snapshot import MetricsSnapshot
from ....cluster.page_feed.items import FeedRevision, ItemChanges
from ....cluster.reports.status import ClusterStatus
from ....proto.errors import InternalError, MoesaicError, NoAnswer, describe_error
from ...runtime.ray_border import CONTROLLER, last_line
from ...store.cluster_secret import secret_of
from .trunk_client import QUESTION_TIMEOUT_S

T = TypeVar("T")

# The planner takes seconds in a large pool, and a constraint waits while the pool changes.
ACTION_S = 120.0
_KEY_S = 5.0


class ControllerStatus:
    """Asks a cluster's controller for its status.

    Ray's call that looks up an actor blocks, for long while Ray's GCS is down, so it has a
    thread of its own.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._controller: Any = None  # this handle stays valid when Ray restarts the controller
        self._looking: asyncio.Future[Any] | None = None

    def __reduce__(self) -> tuple[type[ControllerStatus], tuple[str]]:
        return ControllerStatus, (self._namespace,)

    async def __call__(self) -> ClusterStatus:
        controller = await self.find()
        return await answered(controller.status.remote())

    async def find(self) -> Any:
        """Return the controller's handle. Raises NoAnswer."""
        if self._controller is None:
            if self._looking is None or self._looking.done():
                self._looking = in_thread(self._look)
            try:
                async with asyncio.timeout(QUESTION_TIMEOUT_S):
                    self._controller = await asyncio.shield(self._looking)
            except TimeoutError:
                text = f"Ray did not find the controller within {QUESTION_TIMEOUT_S:g} s"
                raise NoAnswer(text) from None
            except ValueError:
                text = "the controller is not there; it is being restarted"
                raise NoAnswer(text) from None
        return self._controller

    def _look(self) -> Any:
        return ray.get_actor(CONTROLLER, namespace=self._namespace)


@dataclass(frozen=True, slots=True)
class ControllerMetrics:
    """Asks a cluster's controller for what metrics are made of."""

    controller: ControllerStatus
    cluster: str
    hot_experts: int  # how many of them have series

    async def __call__(self) -> MetricsSnapshot:
        found = await self.controller.find()
        return await answered(found.metrics.remote(self.hot_experts))


class ControllerPage:
    """Asks a cluster's controller for the page's items, and to act (`page_app.PageSource`)."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._controller = ControllerStatus(namespace)
        self._key: str | None = None

    def __reduce__(self) -> tuple[type[ControllerPage], tuple[str]]:
        return ControllerPage, (self._namespace,)

    async def items(self, known: FeedRevision | None) -> ItemChanges:
        controller = await self._controller.find()
        return await answered(controller.page_items.remote(known))

    async def act(self, method: str, arguments: tuple[Any, ...]) -> BaseModel:
        controller = await self._controller.find()
        try:
            async with asyncio.timeout(ACTION_S):
                return await getattr(controller, method).remote(*arguments)
        except TimeoutError:
            text = f"the controller did not answer within {ACTION_S:g} s; it may still act"
            raise NoAnswer(text) from None
        except RayTaskError as error:
            if isinstance(error.cause, MoesaicError):
                raise error.cause from None
            raise InternalError(f"{method}: {describe_error(error.cause)}") from error
        except RayError as error:
            raise NoAnswer(f"the controller is being restarted ({last_line(error)})") from error

    async def operator_key(self) -> str:
        if self._key is None:
            try:
                async with asyncio.timeout(_KEY_S):
                    # Ray's store blocks, for long while its GCS is down.
                    secret = await in_thread(lambda: secret_of(self._namespace))
            except TimeoutError:
                text = f"Ray did not give the cluster's secret within {_KEY_S:g} s; try again"
                raise NoAnswer(text) from None
            self._key = secret.operator_key
        return self._key


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run ``work`` in a new thread; the event loop's pool of threads is for short work."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            told = partial(_set, found, work(), None)
        except Exception as error:
            # Whatever it is, it is raised where the result is awaited.
            told = partial(_set, found, None, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its callers with it
            loop.call_soon_threadsafe(told)

    threading.Thread(target=run, daemon=True).start()
    return found


def _set(found: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if found.cancelled():
        return
    if error is None:
        found.set_result(value)
    else:
        found.set_exception(error)


async def answered(asked: Awaitable[T]) -> T:
    """Return the controller's answer.

    Raises NoAnswer where it takes too long or is being restarted, and InternalError where it
    failed.
    """
    try:
        async with asyncio.timeout(QUESTION_TIMEOUT_S):
            return await asked
    except TimeoutError:
        raise NoAnswer(f"the controller did not answer within {QUESTION_TIMEOUT_S:g} s") from None
    except RayTaskError as error:
        cause = describe_error(error.cause)
        raise InternalError(f"the controller could not give its status: {cause}") from error
    except RayError as error:
        raise NoAnswer(f"the controller is being restarted ({last_line(error)})") from error
