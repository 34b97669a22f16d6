"""The parts of the spec below `Spec`, and what all of them share."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..batching.batch_queue import MergePolicy
from ..host.emulation import Emulation
from ..routing.policy import RouterPolicy
from ..scaling.autoscaler import ScalePolicy
from ..service.web_guard import is_host
from .words import with_words

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Micros = Annotated[float, Field(ge=0, le=60e6, allow_inf_nan=False)]
Threads = Annotated[int, Field(ge=1)] | Literal["auto"]
Address = Annotated[str, Field(min_length=1)]


class Part(BaseModel):
    """A mapping of the spec: unknown keys are errors, and each key has a description."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, json_schema_extra=with_words
    )


class EmulationSpec(Part):
    """The time that an emulated device takes for a batch, in microseconds."""

    call_us: Micros = 0.0
    row_us: Micros = 0.0
    expert_us: Micros = 0.0

    @model_validator(mode="after")
    def _takes_time(self) -> EmulationSpec:
        if not self.call_us + self.row_us + self.expert_us > 0:
            raise ValueError("one of call_us, row_us and expert_us must be above 0")
        return self

    def emulation(self) -> Emulation:
        return Emulation(call_us=self.call_us, row_us=self.row_us, expert_us=self.expert_us)


class Resources(Part):
    """The resources that Ray reserves for one actor."""

    num_cpus: Amount = 1
    num_gpus: Amount = 0
    resources: dict[str, Amount] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)


Busy = Annotated[float, Field(gt=0, le=1)]
SecondsOrZero = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Cost = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class AutoscaleSpec(Part):
    """When hosts are added and removed, in groups whose ``min_count`` and ``max_count`` differ.

    ``high`` and ``low`` are fractions of the time in which hosts compute. A host that is not up
    after ``pending_s`` is shown as waiting for a machine.
    """

    high: Busy = 0.75
    low: Busy = 0.35
    up_after_s: SecondsOrZero = 15.0
    down_after_s: SecondsOrZero = 120.0
    cooldown_s: SecondsOrZero = 60.0
    pending_s: SecondsOrZero = 120.0
    max_cost_per_hour: Cost | None = None

    @model_validator(mode="after")
    def _ordered(self) -> AutoscaleSpec:
        if self.low >= self.high:
            raise ValueError("low < high must hold")
        return self

    @property
    def policy(self) -> ScalePolicy:
        return ScalePolicy(
            high=self.high,
            low=self.low,
            up_after_s=self.up_after_s,
            down_after_s=self.down_after_s,
            cooldown_s=self.cooldown_s,
            max_cost_per_hour=self.max_cost_per_hour,
        )


Megabytes = Annotated[float, Field(ge=0.001, le=1024)]


class RouterSpec(Part):
    """The gRPC router service for clients that send hidden states.

    One call may have ``max_call_mb`` of tensors and take ``call_s`` seconds. The service holds at
    most ``max_calls`` calls and ``max_mb`` of tensors and answers at a time. It merges calls of the
    same layer into calls of up to ``max_batch_rows`` rows.
    """

    host: Address = "127.0.0.1"
    port: int = Field(default=8001, ge=0, le=65_535)
    max_batch_rows: int = Field(default=1024, ge=1, le=1 << 20)
    max_calls: int = Field(default=256, ge=1, le=4096)
    max_mb: float = Field(default=256.0, ge=0.002, le=1 << 16, allow_inf_nan=False)
    max_call_mb: Megabytes = 64.0
    call_s: Seconds = 60.0

    @model_validator(mode="after")
    def _ordered(self) -> RouterSpec:
        if 2 * self.max_call_mb > self.max_mb:
            raise ValueError("2 * max_call_mb <= max_mb must hold: a call's answer counts, too")
        return self

    @property
    def max_call_bytes(self) -> int:
        return int(self.max_call_mb * 1e6)

    @property
    def policy(self) -> MergePolicy:
        return MergePolicy(
            max_batch_rows=self.max_batch_rows,
            max_calls=self.max_calls,
            max_bytes=int(self.max_mb * 1e6),
        )


EngineKind = Literal["transformers", "vllm"]


class TrunkSpec(Resources):
    """The processes that hold a model's trunk, and the batch that each of them runs.

    Ray Serve keeps between ``min_replicas`` and ``max_replicas`` of them, so that each has about
    ``target_requests``. With ``min_replicas: 0`` the first request starts one.
    """

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
            raise ValueError("compiled needs engine: vllm")
        return self


_PRIORITIES = 2**31


class LimitSpec(Part):
    """Limits of one request, in addition to those of its model and of the key-value cache.

    ``bodies_mb`` limits the bodies of all requests that arrive or are parsed at the same time; a
    request beyond it is refused with 503 and can be sent again later.
    """

    prompt_tokens: int | None = Field(default=None, ge=1)
    answer_tokens: int | None = Field(default=None, ge=1)
    request_s: Seconds | None = None
    body_mb: float = Field(default=8.0, gt=0, le=1024)
    body_s: Seconds = 30.0
    bodies_mb: float = Field(default=64.0, gt=0, le=1 << 20)
    min_priority: int = Field(default=0, ge=-_PRIORITIES, lt=_PRIORITIES)
    max_priority: int = Field(default=_PRIORITIES - 1, ge=-_PRIORITIES, lt=_PRIORITIES)

    @model_validator(mode="after")
    def _ordered(self) -> LimitSpec:
        if self.body_mb > self.bodies_mb:
            raise ValueError("body_mb <= bodies_mb must hold: bodies_mb includes each body")
        if not self.min_priority <= 0 <= self.max_priority:
            raise ValueError(
                "min_priority <= 0 <= max_priority must hold: the default priority is 0"
            )
        return self


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9]\d{0,4})?")
_OWN_PORTS = {"http": ":80", "https": ":443"}


def _origin(value: str) -> str:
    """Check that an origin has the form that browsers send; it is compared letter by letter."""
    if value == "*":
        return value
    found = _ORIGIN.fullmatch(value)
    if found is None:
        raise ValueError(
            "expected an origin as browsers send it: scheme://host or scheme://host:port in "
            "lower case, without a path or a trailing slash; or '*' alone"
        )
    if found[2] and found[2] == _OWN_PORTS.get(value.partition(":")[0]):
        raise ValueError(f"browsers leave out the scheme's default port; remove {found[2]}")
    return value


def _allowed_host(value: str) -> str:
    if value != "*" and not is_host(value):
        raise ValueError(
            "expected a name or an address as in http://NAME/, without a port (every port is "
            "allowed); or '*' alone"
        )
    return value


class EndpointSpec(Part):
    """The HTTP endpoint.

    If Ray Serve already runs on this Ray, the endpoint uses Serve's address: port 0 takes it, and
    another address is an error.

    Web pages of ``cors_origins``, such as `https://chat.example`, may use the endpoint from a
    browser. `*` allows every page that the browser's user opens, even if the endpoint listens only
    on loopback.

    ``allowed_hosts`` are names that a request's Host header may have, such as `api.example` for an
    endpoint behind a proxy. An endpoint on loopback accepts these and loopback's own names, and
    refuses other names and pages of other sites (403). An endpoint on another address accepts all
    names if ``allowed_hosts`` is empty, else only these, loopback's and its own.
    """

    host: Address = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    cors_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_origin)], ...], Field(strict=False)
    ] = ()
    allowed_hosts: Annotated[
        tuple[Annotated[str, AfterValidator(_allowed_host)], ...], Field(strict=False)
    ] = ()
    limits: LimitSpec = LimitSpec()
    drain_s: float = Field(default=30.0, ge=0, le=86_400, allow_inf_nan=False)

    @model_validator(mode="after")
    def _all_or_some(self) -> EndpointSpec:
        if "*" in self.cors_origins and len(self.cors_origins) > 1:
            raise ValueError("cors_origins: '*' allows all origins; remove the others")
        if "*" in self.allowed_hosts and len(self.allowed_hosts) > 1:
            raise ValueError("allowed_hosts: '*' allows all hosts; remove the others")
        return self


class MonitoringSpec(Part):
    """The address of `/status` and `/metrics`, on the endpoint's machine (Ray's head node)."""

    host: Address = "127.0.0.1"
    port: int = Field(default=8002, ge=0, le=65_535)


class TimeoutSpec(Part):
    """Time limits in seconds."""

    expert_s: Seconds = 60.0
    attempt_s: Seconds = 2.0
    start_s: Seconds = 300.0

    @property
    def policy(self) -> RouterPolicy:
        return RouterPolicy(deadline_s=self.expert_s, attempt_s=min(self.attempt_s, self.expert_s))
