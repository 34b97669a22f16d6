"""The ingress's side of a trunk: calls that carry errors as values, with patience and deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from ....cluster.reports.status import EngineStatus
from ....cluster.service.progress import TrunkHeartbeat
from ....proto.errors import Busy, EngineError
from ...engine.engine import Delta, Pooling, RequestLimits, Sampling
from ...runtime.ray_border import last_line
from .trunk import START_TIMEOUT_S, ErrorValue, Item

if TYPE_CHECKING:
    import numpy as np

# For one call that reads limits or statistics.
QUESTION_TIMEOUT_S = 5.0
# After this long without a token the client asks the trunk whether it is alive.
PATIENCE_S = 15.0

_FULL = "the model's trunks have as many requests as they can take; try again later"

T = TypeVar("T")


class TrunkClient:
    """Calls a trunk's engine from another process; the one class that maps Ray's errors."""

    def __init__(self, handle: DeploymentHandle, cold_start_s: float | None = None) -> None:
        """Create a client; with ``cold_start_s`` the first token may wait that long for a trunk."""
        self.cold_start_s = cold_start_s
        self._handle = handle
        self._asked_serve: asyncio.Future[bool] | None = None
        self._stream = handle.options(stream=True)

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        items = cast(
            "DeploymentResponseGenerator[Item]",
            self._stream.generate.remote(request_id, list(prompt_ids), sampling, list(already)),
        )
        finished = False
        patience_s = self.cold_start_s or PATIENCE_S
        try:
            while not finished:
                item = await self._next(items, patience_s)
                patience_s = PATIENCE_S
                if isinstance(item, ErrorValue):
                    finished = True
                    raise item.error()
                finished = item[1] is not None
                yield Delta(*item)
        except StopAsyncIteration:
            raise EngineError("the trunk's stream of the answer ended too early") from None
        except BackPressureError:
            raise Busy(_FULL) from None
        except (RayError, RayServeException) as error:
            raise EngineError(f"the trunk was lost: {type(error).__name__}") from error
        finally:
            if not finished:
                items.cancel()

    async def embed(
        self, prompts: Sequence[Sequence[int]], pooling: Pooling, request_id: str = ""
    ) -> np.ndarray:
        """Return one vector per prompt; see `EmbeddingEngine.embed`."""
        asked = cast(
            "DeploymentResponse[np.ndarray | ErrorValue]",
            self._handle.embed.remote([list(prompt) for prompt in prompts], pooling, request_id),
        )
        finished = False
        try:
            found = await self._patiently(_result(asked), self.cold_start_s or PATIENCE_S)
            finished = True
        except BackPressureError:
            raise Busy(_FULL) from None
        except (RayError, RayServeException) as error:
            raise EngineError(f"the trunk was lost: {type(error).__name__}") from error
        finally:
            if not finished:
                asked.cancel()
        if isinstance(found, ErrorValue):
            raise found.error()
        return found

    async def _next(self, items: DeploymentResponseGenerator[Item], patience_s: float) -> Item:
        return await self._patiently(items.__anext__(), patience_s)

    async def _patiently(self, asked: Awaitable[T], patience_s: float) -> T:
        """Wait for ``asked``, maybe queued; check every ``patience_s`` that the trunk is alive."""
        waiting = asyncio.ensure_future(asked)
        try:
            while True:
                await asyncio.wait({waiting}, timeout=patience_s)
                if waiting.done():
                    return waiting.result()
                status = await self._ask_status()
                if not status.healthy:
                    raise EngineError(f"the trunk does not answer: {status.last_error}")
        finally:
            waiting.cancel()

    async def limits(self) -> RequestLimits:
        """Return the engine's limits; wait until the trunk has started."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                return await self._question("limits")
        except TimeoutError:
            raise EngineError(f"the trunk did not start within {START_TIMEOUT_S:g} s") from None
        except (RayError, RayServeException) as error:
            raise EngineError(f"the trunk was lost: {type(error).__name__}") from error

    async def status(self) -> EngineStatus:
        """Return the engine's status, or why there is none; do not wake one that may sleep."""
        if self.cold_start_s is not None:
            return EngineStatus(healthy=True, starts_on_demand=True, last_error=None, work=None)
        return await self._ask_status()

    async def _ask_status(self) -> EngineStatus:
        try:
            async with asyncio.timeout(QUESTION_TIMEOUT_S):
                return await self._question("status")
        except TimeoutError:
            why = f"the trunk did not answer within {QUESTION_TIMEOUT_S:g} s"
        except (RayError, RayServeException) as error:
            why = f"{type(error).__name__}: {last_line(error)}"
        return EngineStatus(healthy=False, starts_on_demand=False, last_error=why, work=None)

    async def hear(self) -> TrunkHeartbeat | None:
        """Return a trunk's heartbeat (`health.HeartbeatSource`); do not wake one that sleeps."""
        if not await self.is_awake():
            return None
        asked = cast("DeploymentResponse[TrunkHeartbeat]", self._handle.heartbeat.remote())
        try:
            return await asked
        except asyncio.CancelledError:
            asked.cancel()
            raise

    async def is_awake(self) -> bool:
        """Return whether there is a trunk; asking one that is scaled to zero would start it."""
        if self.cold_start_s is None:
            return True
        if self._asked_serve is None or self._asked_serve.done():
            # Serve may never answer, so at most one thread waits for it.
            self._asked_serve = asyncio.ensure_future(asyncio.to_thread(self._runs))
        return await asyncio.shield(self._asked_serve)

    def _runs(self) -> bool:
        handle = self._handle
        found = serve.status().applications[handle.app_name].deployments[handle.deployment_name]
        return any(count for state, count in found.replica_states.items() if state == "RUNNING")

    async def _question(self, method: str) -> Any:
        return await cast("DeploymentResponse[Any]", getattr(self._handle, method).remote())


async def _result(asked: DeploymentResponse[T]) -> T:
    return await asked
