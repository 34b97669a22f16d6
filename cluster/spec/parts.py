"""What the spec is made of: its parts below `Spec`, and what all of them share."""

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
    """A mapping of the spec: unknown keys fail, and each key has words."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, json_schema_extra=with_words
    )


class EmulationSpec(Part):
    """A device, as a spec has it: microseconds for starting a batch, for each choice (a row and
    one of its experts), and for each expert whose weights the batch reads."""

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
    """What one Ray actor asks for."""

    num_cpus: Amount = 1
    num_gpus: Amount = 0
    resources: dict[str, Amount] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)


Busy = Annotated[float, Field(gt=0, le=1)]
SecondsOrZero = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Cost = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class AutoscaleSpec(Part):
    """When hosts come and go, in groups whose ``min_count`` and ``max_count`` differ.

    ``high`` and ``low`` are parts of the time in which hosts compute. A host that is not up after
    ``pending_s`` is shown as waiting for a machine.
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
    """The gRPC service for clients that bring hidden states; port 0 takes a free one.

    One call may have ``max_call_mb`` of tensors and take ``call_s`` seconds; ``max_calls`` calls
    and ``max_mb`` of tensors and answers are held at a time. Calls of one layer are merged up to
    ``max_batch_rows``.
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


_PRIORITIES = 2**31


class LimitSpec(Part):
    """What one request may ask for, beside what its model and the cache allow: tokens of its prompt
    and of an answer, seconds to its last token, megabytes of its body and seconds for the body to
    arrive, and a ``priority``. The bodies of all requests that arrive or are parsed may have
    ``bodies_mb``; a request beyond them is told to come again later (503)."""

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
            raise ValueError("body_mb <= bodies_mb must hold: one body is among all of them")
        if not self.min_priority <= 0 <= self.max_priority:
            raise ValueError(
                "min_priority <= 0 <= max_priority must hold: a request that says nothing has 0"
            )
        return self


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


def _allowed_host(value: str) -> str:
    if value != "*" and not is_host(value):
        raise ValueError(
            "a name or an address as in http://NAME/ is expected, without a port (any will do); or "
            "'*' alone"
        )
    return value


class EndpointSpec(Part):
    """The HTTP endpoint; port 0 takes a free one, or that of a Serve that runs on the Ray already:
    other addresses are refused then, as a Serve has one. Pages of ``cors_origins`` may use it from
    within a browser, as `https://chat.example` or `http://localhost:3000`; with `*` every page that
    the browser's user opens may, also where the endpoint listens on loopback only. There, requests
    by other names than loopback's are refused (403), and so are those of pages of other sites;
    ``allowed_hosts`` are more names by which it may be asked for, as `api.example` behind a proxy,
    and where it does not listen on loopback the only ones beside its own, if any are given."""

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
            raise ValueError("cors_origins: '*' are all origins; it stands alone")
        if "*" in self.allowed_hosts and len(self.allowed_hosts) > 1:
            raise ValueError("allowed_hosts: '*' are all hosts; it stands alone")
        return self


class MonitoringSpec(Part):
    """Where `/status` and `/metrics` are, for an endpoint's operators: on the machine that has the
    endpoint (Ray's head node); port 0 takes a free one."""

    host: Address = "127.0.0.1"
    port: int = Field(default=8002, ge=0, le=65_535)


class TimeoutSpec(Part):
    """Deadlines in seconds. ``expert_s``: how long a call waits for an expert that is nowhere."""

    expert_s: Seconds = 60.0
    attempt_s: Seconds = 2.0
    start_s: Seconds = 300.0

    @property
    def policy(self) -> RouterPolicy:
        return RouterPolicy(deadline_s=self.expert_s, attempt_s=min(self.attempt_s, self.expert_s))
