"""The interface between the service (tokenizers, HTTP, Ray) and what runs a trunk's model.

Token ids go in and token ids come out, for many requests at once. Nothing here knows about either
side, or needs torch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from ...cluster.reports.status import EngineStatus, EngineWork
from ...cluster.routing.expert_fallback import DroppedExperts
from ...cluster.routing.expert_options import WAIT, ExpertOptions, MissingExpert
from ...cluster.spec.parts import LimitSpec
from ...proto.errors import RequestError
from ..text.answer_form import AnswerForm

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length"]

UNBOUNDED = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one request's tokens are chosen; the caller has checked the values."""

    max_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0  # least probability of a token, as a part of the likeliest token's
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    seed: int | None = None
    logprobs: int | None = (
        None  # how many likeliest tokens to list for each token; None: no log-probabilities
    )
    form: AnswerForm | None = None  # that the answer must have; None: any text
    priority: int = 0  # requests with a smaller number leave the queue sooner
    missing: MissingExpert = WAIT
    experts_per_token: int | None = None  # None: as many as the model's gates choose
    traceparent: str | None = None  # the caller's span, if the request is sampled

    @property
    def expert_options(self) -> ExpertOptions:
        return ExpertOptions(self.missing, self.experts_per_token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooling:
    """How the hidden states of a text become one vector.

    ``kind``: the state of the ``last`` token, or the ``mean`` of all. With ``normalize`` the
    vector's length is 1.
    """

    kind: Literal["last", "mean"] = "last"
    normalize: bool = True


class TokenLogprob(NamedTuple):
    """One generated token's log-probability under the model's own distribution.

    That is the distribution before bias, penalties and temperature.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), the likeliest first


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of a request, without the end-of-text token; the last one says why it ended."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    dropped: DroppedExperts | None = None  # gate weights left out of the request so far
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token, if requested


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertBounds:
    """How many experts a model's tokens may have."""

    maximum: int | None = None  # the model's own number; None: unknown
    default: int | None = None  # for requests that name no number; None: the model's own
    minimum: int | None = None  # the least that a request may name; None: only the default

    def granted(self, asked: int | None) -> int | None:
        """Return the number of experts for a request that asks for ``asked``.

        Raises RequestError where it is out of bounds.
        """
        if asked is None:
            return self.default
        usual = self.default or self.maximum
        least, most = self.minimum or usual, self.maximum or usual
        if least is None or asked < least or (most is not None and asked > most):
            allowed = "none" if least is None else f"{least} to {most or 'what the model has'}"
            raise RequestError(
                f"moesaic.experts_per_token is {asked}; allowed here: {allowed} "
                "(models.min_experts_per_token in the cluster's spec)",
                param="moesaic.experts_per_token",
            )
        return asked


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """What one request may ask for, in tokens, and how many requests are admitted at once."""

    max_prompt_tokens: int
    max_total_tokens: int
    max_requests: int
    vocab_size: int
    max_answer_tokens: int = UNBOUNDED
    experts: ExpertBounds = ExpertBounds()
    request_s: float | None = None  # from a request's start to its last token
    priorities: tuple[int, int] | None = None  # (smallest, largest); None: any

    def within(self, spec: LimitSpec) -> RequestLimits:
        """Return these limits, lowered where the spec allows less."""
        return replace(
            self,
            max_prompt_tokens=min(self.max_prompt_tokens, spec.prompt_tokens or UNBOUNDED),
            max_answer_tokens=min(self.max_answer_tokens, spec.answer_tokens or UNBOUNDED),
            request_s=spec.request_s,
            priorities=(spec.min_priority, spec.max_priority),
        )

    def check(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Check a request against the limits.

        Raises RequestError that names ``prompt``, ``max_tokens``, ``priority`` or
        ``logit_bias``.
        """
        prompt_tokens, max_tokens = len(prompt_ids), sampling.max_tokens
        if prompt_tokens < 1:
            raise RequestError("the prompt is empty", param="prompt")
        if prompt_tokens > self.max_prompt_tokens:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens; at most {self.max_prompt_tokens} are "
                "possible",
                param="prompt",
            )
        if max_tokens < 1:
            raise RequestError(f"max_tokens is {max_tokens}; it must be >= 1", param="max_tokens")
        if max_tokens > self.max_answer_tokens:
            raise RequestError(
                f"max_tokens is {max_tokens}; at most {self.max_answer_tokens} are allowed here",
                param="max_tokens",
            )
        if prompt_tokens + max_tokens > self.max_total_tokens:
            raise RequestError(
                f"prompt ({prompt_tokens} tokens) and max_tokens ({max_tokens}) make "
                f"{prompt_tokens + max_tokens}; at most {self.max_total_tokens} are possible",
                param="max_tokens",
            )
        if self.priorities is not None:
            least, most = self.priorities
            if not least <= sampling.priority <= most:
                raise RequestError(
                    f"priority is {sampling.priority}; {least} to {most} are allowed here",
                    param="priority",
                )
        biased = [token_id for token_id, _ in sampling.logit_bias]
        for param, token_ids in (("prompt", prompt_ids), ("logit_bias", biased)):
            for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
                if not 0 <= token_id < self.vocab_size:
                    raise RequestError(
                        f"{param}: token id {token_id} is not in the vocabulary "
                        f"(0 to {self.vocab_size - 1})",
                        param=param,
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot of an engine; the defaults describe one that is not running."""

    running: int = 0
    waiting: int = 0
    parked: int = 0  # included in waiting: outside the queue, for an expert that no host has now
    restarts: int = 0  # after failed steps
    last_error: str | None = None
    steps: int = 0
    heartbeat_age_s: float = 0.0  # since the loop last looked for work
    cache_free: float = 1.0  # share of the KV cache, 0..1
    healthy: bool = False  # False also when restarts do not help

    def status(self) -> EngineStatus:
        """Return what `status` shows of the engine."""
        return EngineStatus(
            healthy=self.healthy,
            starts_on_demand=False,
            last_error=self.last_error,
            work=EngineWork(
                running_requests=self.running,
                waiting_requests=self.waiting,
                parked_requests=self.parked,
                steps=self.steps,
                restarts=self.restarts,
                beat_age_s=round(self.heartbeat_age_s, 3),
                free_cache_fraction=round(self.cache_free, 4),
            ),
        )


class Generate(Protocol):
    """The signature of `Engine.generate`, here or in another process."""

    def __call__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        """Yield new tokens until a Delta has a finish reason.

        Closing the generator cancels the request. ``already`` has the answer's first tokens
        where another trunk has generated them. They count towards the answer, and are not
        yielded again.

        Raises RequestError, Busy, EngineError (retryable), or an error that ended only this
        request.
        """
        ...


class Engine(Protocol):
    """Runs requests of one model; any thread with an event loop may call any method."""

    @property
    def limits(self) -> RequestLimits: ...

    def start(self) -> None:
        """Allocate the cache and start the loop; raise when the model cannot be batched."""
        ...

    @property
    def generate(self) -> Generate: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """End the requests in flight with EngineError, then the loop and its thread; repeatable."""
        ...


@runtime_checkable
class EmbeddingEngine(Protocol):
    """An engine that can also turn texts into vectors."""

    async def embed(
        self, prompts: Sequence[Sequence[int]], pooling: Pooling, request_id: str = ""
    ) -> np.ndarray:
        """Return (N, H) float32: for each prompt the pooled hidden states after the last norm.

        ``request_id`` is for the log.

        Raises RequestError, Busy, EngineError (retryable), or what went wrong with a
        prompt.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sizes and timeouts of an engine.

    ``num_blocks`` None: 8,192 cached tokens on a CPU; on CUDA as many as fit.
    """

    page_size: int = 32  # tokens per KV page
    num_blocks: int | None = None  # pages per layer
    cache_memory_fraction: float = 0.5  # of the free memory, where num_blocks is None
    max_batch_tokens: int = 512  # per step: bounds how long a prefill delays other requests
    max_requests: int = 32  # per step
    max_waiting: int = 256  # in addition to those that run
    park_s: float = 60.0  # how long a request waits for an expert that no host has
    stall_timeout_s: float = 120.0  # after this long without a step requests fail with EngineError
    close_timeout_s: float = 10.0
    compiled: bool = False  # vLLM only: compile the layers around the experts
