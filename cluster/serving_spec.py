"""The parts of the spec that say how requests are served."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from .health import RouterPolicy
from .spec_part import Address, Part, Resources, Seconds, Threads

EngineKind = Literal["transformers", "vllm"]


class TrunkSpec(Resources):
    """The process that holds a model's trunk, and the batch it runs. Serve keeps between
    ``min_replicas`` and ``max_replicas`` of them, so that each has about ``target_requests``; with
    ``min_replicas: 0`` the first request starts one. ``compiled``: by vLLM, around the experts."""

    engine: EngineKind = "transformers"
    compiled: bool = False
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: Threads = "auto"
    max_requests: int = Field(default=32, ge=1, le=4096)
    max_waiting: int = Field(default=256, ge=0, le=1 << 20)
    max_batch_tokens: int = Field(default=512, ge=1, le=1 << 20)
    cache_tokens: int = Field(default=16_384, ge=64, le=1 << 28)
    min_replicas: int = Field(default=1, ge=0, le=1024)
    max_replicas: int = Field(default=1, ge=1, le=1024)
    target_requests: float = Field(default=16.0, gt=0, le=4096)

    @model_validator(mode="after")
    def _ordered(self) -> TrunkSpec:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas <= max_replicas must hold")
        if self.compiled and self.engine != "vllm":
            raise ValueError("compiled belongs to engine: vllm alone")
        return self


class LimitSpec(Part):
    """What one request may ask for, beside what its model and the cache allow: tokens of its prompt
    and of an answer, seconds to its last token, megabytes of its body."""

    prompt_tokens: int | None = Field(default=None, ge=1)
    answer_tokens: int | None = Field(default=None, ge=1)
    request_s: Seconds | None = None
    body_mb: float = Field(default=8.0, gt=0, le=1024)


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9]\d{0,4})?")
_OWN_PORTS = {"http": ":80", "https": ":443"}


def _origin(value: str) -> str:
    """Origins are compared letter by letter, so it must be what browsers send."""
    if value == "*":
        return value
    found = _ORIGIN.fullmatch(value)
    if found is None:
        raise ValueError(
            "an origin as browsers send it is expected: scheme://host or scheme://host:port in "
            "small letters, without a path or a slash at its end; or '*' alone"
        )
    if found[2] and found[2] == _OWN_PORTS.get(value.partition(":")[0]):
        raise ValueError(f"browsers leave out {found[2]}, the port of the scheme itself")
    return value


class EndpointSpec(Part):
    """The HTTP endpoint; port 0 takes a free one, or that of a Serve that runs on the Ray already:
    other addresses are refused then, as a Serve has one. Pages of ``cors_origins`` may use it from
    within a browser, as `https://chat.example` or `http://localhost:3000`; with `*` every page that
    the browser's user opens may, also where the endpoint listens on loopback only."""

    host: Address = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    cors_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_origin)], ...], Field(strict=False)
    ] = ()
    limits: LimitSpec = LimitSpec()
    drain_s: float = Field(default=30.0, ge=0, le=86_400, allow_inf_nan=False)

    @model_validator(mode="after")
    def _all_or_some(self) -> EndpointSpec:
        if "*" in self.cors_origins and len(self.cors_origins) > 1:
            raise ValueError("cors_origins: '*' are all origins; it stands alone")
        return self


class TimeoutSpec(Part):
    """Deadlines in seconds. ``expert_s``: how long a call waits for an expert that is nowhere."""

    expert_s: Seconds = 60.0
    attempt_s: Seconds = 2.0
    start_s: Seconds = 300.0

    @property
    def policy(self) -> RouterPolicy:
        return RouterPolicy(deadline_s=self.expert_s, attempt_s=min(self.attempt_s, self.expert_s))
