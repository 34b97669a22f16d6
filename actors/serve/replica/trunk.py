"""A trunk as a deployment of Ray Serve, and errors as values.

    HTTP proxy -> Ingress (tokenizers, text, SSE) -> handle, streaming -> Trunk (an Engine)

Errors cross as values: Ray would wrap an exception in a class of its own and log a traceback for
every refused request. `Trunk.generate` yields the parts of a Delta, or a `ErrorValue`;
`TrunkClient` raises the original error again, and turns Ray's own errors into EngineError.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve import Deployment

from ....cluster.reports.status import EngineStatus
from ....cluster.routing.expert_fallback import DroppedExperts
from ....cluster.service.progress import STALLED_S, TrunkHeartbeat
from ....proto.errors import (
    EngineError,
    InternalError,
    MoesaicError,
    RequestError,
    describe_error,
    from_wire,
)
from ...engine.engine import (
    EmbeddingEngine,
    Engine,
    FinishReason,
    Pooling,
    RequestLimits,
    Sampling,
    TokenLogprob,
)
from ...engine.traced import trace_id_of, traced_generate
from .first_token import make_first_token
from .starting import starting

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

# Above what the engine and the ingress's gate admit: they refuse with Busy before Serve queues
# anything, so that probes and the call that drains the ingress always get through.
MAX_ONGOING = 4096
# For an engine to close.
CLOSE_S = 15.0
# Building a trunk reads a checkpoint, which may be large.
START_TIMEOUT_S = 600.0


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
    # Its successor has started before it ends.
    max_surge_percent=100,
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


def _failure(error: Exception, request_id: str) -> ErrorValue:
    """Return an error of the engine as a value, and log it if it is not a `MoesaicError`."""
    if isinstance(error, MoesaicError):
        return ErrorValue.of(error)
    text = "request %s: unexpected error of the engine"
    logger.error(text, request_id, exc_info=error, extra={"request_id": request_id})
    return ErrorValue.of(InternalError(describe_error(error)))


def versioned(deployment: Deployment, version: str) -> Deployment:
    """Let Serve keep a deployment's replicas as long as its ``version`` stays; empty: never.

    Serve gives each deployment a version of its own, which has no public option.
    """
    deployment._version = version or None
    return deployment


def ending_s(drain_s: float) -> float:
    """Return a replica's shutdown timeout: its requests finish first, then its engine closes."""
    return drain_s + CLOSE_S
