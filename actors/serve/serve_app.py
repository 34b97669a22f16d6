"""Wrap the service in two Ray Serve deployments, and carry errors across their border.

    HTTP proxy -> Ingress (tokenizers, text, SSE) -> handle, streaming -> Trunk (an Engine)

Errors cross as values: Ray would wrap an exception in a class of its own and log a traceback for
every refused request. `Trunk.generate` yields the parts of a Delta, or a `ErrorValue`;
`TrunkClient` raises the original error again, and turns Ray's own errors into EngineError.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from ...cluster.reports.status import EngineStatus
from ...cluster.routing.expert_fallback import DroppedExperts
from ...cluster.service.progress import STALLED_S, ModelProgress, TrunkHeartbeat
from ...cluster.service.web_guard import WebGuard
from ...cluster.spec.monitoring import MonitoringSpec
from ...cluster.spec.parts import EndpointSpec
from ...proto.errors import (
    Busy,
    EngineError,
    InternalError,
    MoesaicError,
    RequestError,
    describe_error,
    from_wire,
)
from ..endpoint.http.bodies import BodyLimits
from ..endpoint.http.gate import Gate
from ..endpoint.http.health import Health, ModelHealth
from ..endpoint.http.metrics import HttpMetrics
from ..endpoint.http.monitoring_app import PoolSource
from ..endpoint.ingress import create_app
from ..engine.engine import (
    Delta,
    EmbeddingEngine,
    Engine,
    ExpertBounds,
    FinishReason,
    Pooling,
    RequestLimits,
    Sampling,
    TokenLogprob,
)
from ..engine.served_model import ServedModel
from ..engine.traced import trace_id_of, traced_call, traced_generate
from ..page.page_app import PageSource
from ..runtime.log_settings import log_runtime_env
from ..runtime.ray_border import HEAD_NODE, last_line
from .first_token import make_first_token
from .monitoring_address import ClusterStatusSource, Watched
from .replica_start import starting

if TYPE_CHECKING:
    import numpy as np
    from ray.serve import Application
    from starlette.types import StatelessLifespan
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Above what the engine and the ingress's gate admit: they refuse with Busy before Serve queues
# anything, so that probes and the call that drains the ingress always get through.
MAX_ONGOING = 4096
# For one call that reads limits or statistics.
QUESTION_TIMEOUT_S = 5.0
# After this long without a token the client asks the trunk whether it is alive.
PATIENCE_S = 15.0
# For an engine to close.
CLOSE_S = 15.0
# Building a trunk reads a checkpoint, which may be large.
START_TIMEOUT_S = 600.0

_FULL = "the model's trunks have as many requests as they can take; try again later"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ErrorValue:
    """A MoesaicError as a value, so that it can cross Ray."""

    code: str
    message: str
    param: str | None

    @classmethod
    def of(cls, error: MoesaicError) -> ErrorValue:
        return cls(error.code, str(error), getattr(error, "param", None))

    def error(self) -> MoesaicError:
        error = from_wire(self.code, self.message)
        if isinstance(error, RequestError):
            error.param = self.param
        return error


# A plain tuple is three times cheaper to pickle than a Delta, and there is one per token.
Tokens = tuple[
    tuple[int, ...], FinishReason | None, DroppedExperts | None, tuple[TokenLogprob, ...]
]
Item = Tokens | ErrorValue


# One attempt per start, since a start that failed would fail again. A replica that has served
# once is always replaced. `deploy_endpoint` sets the shutdown timeout (`ending_s`).
@serve.deployment(
    name="Trunk",
    max_ongoing_requests=MAX_ONGOING,
    graceful_shutdown_wait_loop_s=0.2,
    max_constructor_retry_count=1,
)
class Trunk:
    """Owns an Engine, which ``engine_factory`` makes in the replica's process."""

    def __init__(self, engine_factory: Callable[[], Engine]) -> None:
        self._identity = uuid.uuid4().hex
        with starting("trunk"):
            self._engine = engine_factory()
            self._engine.start()
            make_first_token(self._engine, START_TIMEOUT_S)

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int],
    ) -> AsyncGenerator[Item, None]:
        if logger.isEnabledFor(logging.DEBUG):
            ids: dict[str, Any] = {"request_id": request_id, "prompt_tokens": len(prompt_ids)}
            ids["trace_id"] = trace_id_of(sampling)
            logger.debug("request %s has come", request_id, extra=ids)
        generate = traced_generate(self._engine.generate)
        generated = generate(request_id, prompt_ids, sampling, already)
        try:
            async with aclosing(generated) as deltas:
                async for delta in deltas:
                    yield delta.token_ids, delta.finish_reason, delta.dropped, delta.logprobs
        except Exception as error:
            # Whatever it is, the ingress gets it as a value: it might not unpickle the exception.
            yield _failure(error, request_id)

    async def embed(
        self, prompts: list[list[int]], pooling: Pooling, request_id: str = ""
    ) -> np.ndarray | ErrorValue:
        try:
            if not isinstance(self._engine, EmbeddingEngine):
                engine = type(self._engine).__name__
                text = f"the model's engine ({engine}) makes no embeddings; use another model"
                raise RequestError(text, param="model")
            return await self._engine.embed(prompts, pooling, request_id)
        except Exception as error:
            # Any error becomes a value, as in `generate`.
            return _failure(error, request_id)

    async def limits(self) -> RequestLimits:
        return self._engine.limits

    async def status(self) -> EngineStatus:
        return self._engine.stats().status()

    async def heartbeat(self) -> TrunkHeartbeat:
        """Return the state of this replica's engine alone."""
        stats = self._engine.stats()
        return TrunkHeartbeat(
            trunk=self._identity,
            steps=stats.steps,
            busy=stats.running + stats.waiting > 0,
            beats=stats.healthy and stats.heartbeat_age_s < STALLED_S,
        )

    def check_health(self) -> None:
        """Raise EngineError when the engine is not healthy; Serve then replaces the replica."""
        stats = self._engine.stats()
        if not stats.healthy:
            raise EngineError(f"the engine is not healthy: {stats.last_error}")

    def __del__(self) -> None:
        # Serve calls this at shutdown; Python also does when the constructor failed.
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()


class TrunkClient:
    """Calls a trunk's engine from another process; the one class that maps Ray's errors."""

    def __init__(self, handle: DeploymentHandle, cold_start_s: float | None = None) -> None:
        """Create a client; with ``cold_start_s`` the first token may wait that long for a trunk."""
        self._cold_start_s = cold_start_s
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
        patience_s = self._cold_start_s or PATIENCE_S
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
            found = await self._patiently(_result(asked), self._cold_start_s or PATIENCE_S)
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
        if self._cold_start_s is not None:
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
        if self._cold_start_s is not None and not await self._is_awake():
            return None
        asked = cast("DeploymentResponse[TrunkHeartbeat]", self._handle.heartbeat.remote())
        try:
            return await asked
        except asyncio.CancelledError:
            asked.cancel()
            raise

    async def _is_awake(self) -> bool:
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


# The ingress runs on the head node, where Serve's proxy is, so that monitoring can be reached from
# where the endpoint can. It reserves no core, since Ray may have none left there.
_BESIDE_THE_PROXY = {"num_cpus": 0, "resources": {HEAD_NODE: 0.001}}


@serve.deployment(
    name="Ingress",
    max_ongoing_requests=2 * MAX_ONGOING,
    graceful_shutdown_wait_loop_s=0.2,
    max_constructor_retry_count=1,
    ray_actor_options=_BESIDE_THE_PROXY,
)
@serve.ingress()
class Ingress:
    """The HTTP app in a process of its own: it has tokenizers and text, trunks send it tokens."""

    def __init__(
        self,
        trunks: dict[str, DeploymentHandle],
        tokenizers: dict[str, Callable[[], PreTrainedTokenizerBase]],
        status: ClusterStatusSource | None,
        cold_start_s: float | None,
        endpoint: EndpointSpec,
        aliases: Mapping[str, Sequence[str]],
        experts: Mapping[str, ExpertBounds],
        monitoring: MonitoringSpec | None,
        own_hosts: Collection[str],
        page: PageSource | None,
        pool: PoolSource | None,
    ) -> None:
        self._endpoint = endpoint
        self._monitoring = monitoring
        self._own_hosts = own_hosts
        self._page = page
        self._pool = pool
        self._aliases = aliases
        self._experts = experts
        self._trunks = {name: TrunkClient(one, cold_start_s) for name, one in trunks.items()}
        self._health = {
            name: ModelHealth(ModelProgress(wake_s=cold_start_s or 0.0), trunk.hear)
            for name, trunk in self._trunks.items()
        }
        self._gate = Gate(MAX_ONGOING)
        self._tokenizers = tokenizers
        self._cluster_status = status

    async def __serve_build_asgi_app__(self) -> FastAPI:
        with starting("ingress"):
            models = {name: await self._model(name, trunk) for name, trunk in self._trunks.items()}
        endpoint, metrics = self._endpoint, HttpMetrics()
        health = Health(self._health, self._aliases, leaving=lambda: self._gate.ending)
        return create_app(
            models=models,
            bodies=BodyLimits.of(endpoint.limits),
            aliases=self._aliases,
            cors_origins=endpoint.cors_origins,
            guard=WebGuard.of(
                endpoint.host,
                allowed_hosts=endpoint.allowed_hosts,
                origins=endpoint.cors_origins,
                own=self._own_hosts,
            ),
            metrics=metrics,
            lifespan=self._lifespan(metrics, health),
            health=health,
            gate=self._gate,
        )

    async def drain(self, drain_s: float) -> int:
        """Refuse new requests, give running ones ``drain_s`` seconds, and return how many run."""
        return self._gate.drain(drain_s)

    async def running(self) -> int:
        """Return how many requests are not over."""
        return self._gate.running

    def _lifespan(self, metrics: HttpMetrics, health: Health) -> StatelessLifespan[FastAPI] | None:
        """Return a lifespan that runs the monitoring server as long as the app, or None."""
        if self._monitoring is None:
            return None
        watched = Watched(
            trunks=self._trunks,
            cluster=self._cluster_status,
            page=self._page,
            pool=self._pool,
            gate=self._gate,
        )
        return watched.lifespan(
            self._monitoring,
            metrics,
            health,
            allowed_hosts=self._endpoint.allowed_hosts,
            own_hosts=self._own_hosts,
        )

    async def _model(self, name: str, trunk: TrunkClient) -> ServedModel:
        tokenizer = self._tokenizers[name]()
        limits = (await trunk.limits()).within(self._endpoint.limits)
        limits = replace(limits, experts=self._experts.get(name, limits.experts))
        health = self._health[name]
        generate, embed = health.watch(trunk.generate), health.watch_embed(trunk.embed)
        return ServedModel(name, tokenizer, limits, traced_call(generate, name), embed)


def _failure(error: Exception, request_id: str) -> ErrorValue:
    """Return an error of the engine as a value, and log it if it is not a `MoesaicError`."""
    if isinstance(error, MoesaicError):
        return ErrorValue.of(error)
    text = "request %s: unexpected error of the engine"
    logger.error(text, request_id, exc_info=error, extra={"request_id": request_id})
    return ErrorValue.of(InternalError(describe_error(error)))


async def _result(asked: DeploymentResponse[T]) -> T:
    return await asked


def ending_s(drain_s: float) -> float:
    """Return a replica's shutdown timeout: its requests finish first, then its engine closes."""
    return drain_s + CLOSE_S


def build(
    trunks: Mapping[str, Application],
    tokenizers: Mapping[str, Callable[[], PreTrainedTokenizerBase]],
    *,
    status: ClusterStatusSource | None = None,
    cold_start_s: float | None = None,
    endpoint: EndpointSpec | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    experts: Mapping[str, ExpertBounds] | None = None,
    monitoring: MonitoringSpec | None = None,
    own_hosts: Collection[str] = (),
    page: PageSource | None = None,
    pool: PoolSource | None = None,
) -> Application:
    """Return the application for ``serve.run``.

    ``trunks`` maps model names to ``Trunk.bind(EngineFactory(...))``. ``status`` is called in the
    ingress; its answer is part of ``/status``, which is at the address ``monitoring``, whose port
    must be set. With ``cold_start_s`` trunks may scale to zero and take that long to
    come back. ``aliases``: more names, by model. ``own_hosts``: host names by which clients are
    told to reach the endpoint. ``page`` is what the page at that address is about; None: no page.
    ``pool`` adds the pool's metrics to ``/metrics``.
    """
    endpoint = endpoint or EndpointSpec()
    return Ingress.options(
        graceful_shutdown_timeout_s=ending_s(endpoint.drain_s),
        ray_actor_options=_BESIDE_THE_PROXY | log_runtime_env(),
    ).bind(
        dict(trunks),
        dict(tokenizers),
        status,
        cold_start_s,
        endpoint,
        dict(aliases or {}),
        dict(experts or {}),
        monitoring,
        tuple(own_hosts),
        page,
        pool,
    )
