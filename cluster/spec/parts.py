"""The parts of the spec below `Spec`, and what all of them share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)

from ..batching.batch_queue import MergePolicy
from ..card_memory import CardShare
from ..host.emulation import Emulation
from ..routing.policy import RouterPolicy
from ..routing.transports import TransportChoice
from ..scaling.autoscaler import ScalePolicy
from ..service.web_guard import is_host
from .text import bytes_of, flowing, part_or_bytes

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Micros = Annotated[float, Field(ge=0, le=60e6, allow_inf_nan=False)]
Threads = Annotated[int, Field(ge=1)] | Literal["auto"]
Address = Annotated[str, Field(min_length=1)]
PartOrBytes = Annotated[float | str, PlainValidator(part_or_bytes)]


def _flowing_descriptions(schema: dict[str, Any]) -> None:
    """Remove the source's line breaks from a schema's descriptions; editors would show them."""
    for described in (schema, *schema.get("properties", {}).values()):
        if "description" in described:
            described["description"] = flowing(described["description"])


class Part(BaseModel):
    """A mapping of the spec: unknown keys are errors.

    The text below a field describes its key, in the JSON schema and in docs/spec.md.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        json_schema_extra=_flowing_descriptions,
    )


class EmulationSpec(Part):
    """The device that the hosts of a group imitate.

    A batch takes the sum of these times, or the host's own time if that is longer.
    """

    call_us: Micros = 0.0
    """Microseconds that the imitated device takes to start a batch."""

    row_us: Micros = 0.0
    """Microseconds that the imitated device takes for each assignment in a batch, which is a token
    and one of its experts."""

    expert_us: Micros = 0.0
    """Microseconds that the imitated device takes to read the weights of each expert that a batch
    uses."""

    @model_validator(mode="after")
    def _takes_time(self) -> EmulationSpec:
        if not self.call_us + self.row_us + self.expert_us > 0:
            raise ValueError("one of call_us, row_us and expert_us must be above 0")
        return self

    def emulation(self) -> Emulation:
        return Emulation(call_us=self.call_us, row_us=self.row_us, expert_us=self.expert_us)


class NetworkSpec(Part):
    """The network between the trunks, which call experts, and the hosts, which compute them."""

    bind: Address = "127.0.0.1"
    """Address on which each host listens for the trunks' connections. `127.0.0.1` (default): only
    trunks on the same machine reach the host. `node`: the address of the machine on which the host
    runs."""

    transport: TransportChoice = "auto"
    """How tensors travel between trunks and hosts. `auto`: shared memory on one machine, gRPC
    between machines. `shm`, `grpc`: always shared memory, or always gRPC; `shm` works only on one
    machine. `group`: torch.distributed (NCCL between GPUs, else gloo). `device`: CUDA IPC or NCCL
    between two GPUs, else as `auto`."""

    lending: Lending = "auto"
    """Whether trunks compute with the memory of hosts on their own machine instead of sending them
    calls. `never`: every call is sent. `auto`: hosts lend to trunks on the same device (the CPU, or
    the same GPU), if calls would go through shared memory; on CPUs a call is still sent in part
    where that was measured to be faster. `always`: trunks compute everything that is lent, and a
    host that cannot lend is an error. The router service without `router.threads` sends every
    call."""

    @model_validator(mode="after")
    def _lends_over_shared_memory(self) -> NetworkSpec:
        if self.lending == "always" and self.transport not in ("auto", "shm"):
            raise ValueError(
                f"lending: 'always' needs shared memory, and transport is {self.transport!r}; set "
                "transport to 'auto' or 'shm', or lending to 'auto'"
            )
        return self

    @model_validator(mode="after")
    def _groups_need_an_address(self) -> NetworkSpec:
        if self.transport == "group" and self.bind in ("0.0.0.0", "::", "[::]"):
            raise ValueError(
                f"transport: 'group' needs an address to connect to, and bind: {self.bind!r} "
                "stands for all addresses; set bind to an address, or to 'node' for each machine's "
                "own"
            )
        return self


class Resources(Part):
    """What Ray reserves for each of some identical processes, and which nodes may run them."""

    num_cpus: Amount = 1
    """Number of CPUs that Ray reserves for each process of this section: for each host, or for each
    trunk."""

    num_gpus: Amount = 0
    """Number of GPUs that Ray reserves for each host, or for each trunk. With a fraction such as
    0.5 several processes share a GPU."""

    gpu_memory: PartOrBytes | None = None
    """Largest part of its GPU's memory that each host, or each trunk, may take with all that it
    has there: a fraction of the GPU, or bytes such as `20GB`. A host keeps what its context and its
    computations need, and experts may take the rest. Default `null`: the part in `num_gpus` if that
    is below 1, else no limit (docs/gpu.md)."""

    resources: dict[str, Amount] = Field(default_factory=dict)
    """Custom resources that Ray reserves for each host, or for each trunk: the resource's name and
    the amount."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that a Ray node must have to run a host, or a trunk, in the form of Ray's label
    selectors."""

    def check_card(self, device: str) -> None:
        """Check that a limit of a GPU's memory has a GPU; raises ValueError."""
        if device == "cpu" and self.gpu_memory is not None:
            raise ValueError(
                "gpu_memory limits what is taken of a GPU, and device is 'cpu'; leave it out"
            )

    def card_share(self, key: str, *, trains: bool = False) -> CardShare:
        """Return what each process may take of its GPU; ``key`` is this section's in the spec."""
        limit = bytes_of(self.gpu_memory) if isinstance(self.gpu_memory, str) else self.gpu_memory
        return CardShare(key=key, gpu_memory=limit, num_gpus=self.num_gpus, trains=trains)


BusyFraction = Annotated[float, Field(gt=0, le=1)]
SecondsOrZero = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Cost = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class AutoscaleSpec(Part):
    """When hosts are added and removed, in groups whose ``min_count`` and ``max_count`` differ.

    Hosts are also added when calls wait longer than their computation takes. A host is removed only
    if the others can do its work.
    """

    scale_up_above: BusyFraction = 0.75
    """Mean busy fraction of all hosts above which hosts are added: the part of their time in which
    hosts compute, as a moving average over about half of `up_after_s`."""

    scale_down_below: BusyFraction = 0.35
    """Mean busy fraction of all hosts below which one host is removed: the part of their time in
    which hosts compute, as a moving average over about half of `down_after_s`."""

    up_after_s: SecondsOrZero = 15.0
    """Seconds for which the mean busy fraction of hosts must stay above `scale_up_above` before
    hosts are added."""

    down_after_s: SecondsOrZero = 120.0
    """Seconds for which the mean busy fraction of hosts must stay below `scale_down_below` before
    one host is removed."""

    cooldown_s: SecondsOrZero = 60.0
    """Seconds that the autoscaler pauses after each change of the number of hosts, also after
    `moesaic scale N`."""

    pending_s: SecondsOrZero = 120.0
    """Seconds after which `status` says that a requested host which is not up waits for a
    machine."""

    max_cost_per_hour: Cost | None = None
    """Largest cost per hour of all hosts together, as the sum of their groups' `cost_per_hour`. The
    autoscaler adds no host if the sum would be larger. Default `null`: no limit."""

    @model_validator(mode="after")
    def _ordered(self) -> AutoscaleSpec:
        if self.scale_down_below >= self.scale_up_above:
            raise ValueError("scale_down_below < scale_up_above must hold")
        return self

    @property
    def policy(self) -> ScalePolicy:
        return ScalePolicy(
            scale_up_above=self.scale_up_above,
            scale_down_below=self.scale_down_below,
            up_after_s=self.up_after_s,
            down_after_s=self.down_after_s,
            cooldown_s=self.cooldown_s,
            max_cost_per_hour=self.max_cost_per_hour,
        )


Megabytes = Annotated[float, Field(ge=0.001, le=1024)]


class RouterSpec(Part):
    """The gRPC router service, which computes MoE layers for clients that send hidden states.

    It merges the calls that wait for the same layer, from all clients, into one call to the hosts.
    """

    host: Address = "127.0.0.1"
    """Address on which the router service listens. `127.0.0.1` (default): only programs on the same
    machine reach the service."""

    port: int = Field(default=8001, ge=0, le=65_535)
    """Port on which the router service listens. 0: any free port, which the service keeps when it
    restarts."""

    max_batch_rows: int = Field(default=1024, ge=1, le=1 << 20)
    """Largest number of rows (tokens) in one call to the hosts, which the service merges from its
    clients' calls for the same layer."""

    max_calls: int = Field(default=256, ge=1, le=4096)
    """Largest number of calls that the service holds at the same time. Beyond it,
    the service refuses calls of the client that has the most calls in it."""

    max_mb: float = Field(default=256.0, ge=0.002, le=1 << 16, allow_inf_nan=False)
    """Largest size of the tensors and answers of all calls in the service together, in megabytes.
    Beyond it, the service refuses calls of the client whose calls take the most."""

    max_call_mb: Megabytes = 64.0
    """Largest size of the tensors of one call, in megabytes. Moesaic's client splits larger
    calls."""

    threads: int = Field(default=0, ge=0, le=1024)
    """Number of CPU threads with which the service computes what hosts of its machine lend
    (`network.lending`). 0 (default): hosts compute every call."""

    call_s: Seconds = 60.0
    """Largest number of seconds that one call may take, even if the client's deadline is later.
    After that, the call ends with an error."""

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
Lending = Literal["never", "auto", "always"]


class TrunkSpec(Resources):
    """The processes that hold a model's trunk, and the batch of requests that each of them runs.

    Ray Serve keeps between ``min_replicas`` and ``max_replicas`` of them for each model, so that
    each has about ``target_requests``.
    """

    engine: EngineKind = "transformers"
    """The engine that batches requests and runs the trunk. `transformers`: Moesaic's own engine,
    for any supported model. `vllm`: vLLM, which must be installed."""

    compiled: bool = False
    """Whether vLLM compiles the layers around the experts, which is faster but slower to start.
    `true` needs `engine: vllm`."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Device on which a trunk runs: `cpu`, `cuda`, `cuda:1` (the second GPU), or `auto`: a GPU if
    there is one, else the CPU."""

    threads: Threads = "auto"
    """Number of CPU threads that one computation of a trunk uses. `auto`: the number of the
    machine's cores."""

    max_requests: int = Field(default=32, ge=1, le=4096)
    """Largest number of requests in the batch of one trunk."""

    max_waiting: int = Field(default=256, ge=0, le=1 << 20)
    """Largest number of requests that may wait until the batch of one trunk can take them. Further
    requests are refused with status 429."""

    max_batch_tokens: int = Field(default=512, ge=1, le=1 << 20)
    """Largest number of tokens that one trunk computes in one forward pass. With a smaller number,
    a long prompt delays other requests less."""

    cache_tokens: int = Field(default=16_384, ge=64, le=1 << 28)
    """Number of tokens that fit into the key-value cache of one trunk, for all its requests
    together."""

    min_replicas: int = Field(default=1, ge=0, le=1024)
    """Smallest number of trunks that run for each model. 0: the last trunk ends when it has no
    requests, and the next request starts a trunk."""

    max_replicas: int = Field(default=1, ge=1, le=1024)
    """Largest number of trunks that run for each model."""

    target_requests: float = Field(default=16.0, gt=0, le=4096)
    """Number of requests in progress per trunk at which Ray Serve aims. Serve adds trunks if there
    are more requests, and removes trunks if there are fewer."""

    @model_validator(mode="after")
    def _ordered(self) -> TrunkSpec:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas <= max_replicas must hold")
        self.check_card(self.device)
        if self.compiled and self.engine != "vllm":
            raise ValueError("compiled: true needs engine: vllm; set it, or leave out compiled")
        return self


_PRIORITIES = 2**31


class LimitSpec(Part):
    """Limits of one request, in addition to those of its model and of the key-value cache."""

    prompt_tokens: int | None = Field(default=None, ge=1)
    """Largest number of tokens in the prompt of a request. Longer prompts are refused. Default
    `null`: as many as the model and the key-value cache allow."""

    answer_tokens: int | None = Field(default=None, ge=1)
    """Largest number of tokens that a request may ask for as its answer. Default `null`: as many as
    the model and the key-value cache allow."""

    request_s: Seconds | None = None
    """Largest number of seconds from a request's start to the last token of its answer. After that,
    the request ends with status 504. Default `null`: no limit."""

    body_mb: float = Field(default=8.0, gt=0, le=1024)
    """Largest body of one HTTP request, in megabytes. Requests with a larger body are refused with
    status 413."""

    body_s: Seconds = 30.0
    """Seconds in which the body of an HTTP request must have arrived. After that, the request is
    refused with status 408."""

    bodies_mb: float = Field(default=64.0, gt=0, le=1 << 20)
    """Largest size of the bodies of all requests together while they arrive or are parsed, in
    megabytes. A request for which there is no memory left gets status 503; send it again later."""

    min_priority: int = Field(default=0, ge=-_PRIORITIES, lt=_PRIORITIES)
    """Smallest `priority` that a request may have. Waiting requests with a smaller priority go
    first. A request without `priority` has 0; by default no request can go before it."""

    max_priority: int = Field(default=_PRIORITIES - 1, ge=-_PRIORITIES, lt=_PRIORITIES)
    """Largest `priority` that a request may have. Waiting requests with a larger priority go
    later."""

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
    """The HTTP endpoint, which serves chat, completions and embeddings as OpenAI's API does.

    If Ray Serve already runs on this Ray, the endpoint uses Serve's address: port 0 takes it, and
    another address is an error.

    An endpoint on loopback accepts loopback's own names in the Host header, and those of
    ``allowed_hosts``. It refuses other names, and pages of other sites (403). An endpoint on
    another address accepts all names if ``allowed_hosts`` is empty, else only these, loopback's and
    its own.
    """

    host: Address = "127.0.0.1"
    """Address on which the HTTP endpoint listens. `127.0.0.1` (default): only programs on the same
    machine reach the endpoint. `0.0.0.0`: all of the machine's addresses."""

    port: int = Field(default=8000, ge=0, le=65_535)
    """Port on which the HTTP endpoint listens. 0: any free port, or the port of a Ray Serve that
    already runs."""

    cors_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_origin)], ...], Field(strict=False)
    ] = ()
    """Origins such as `https://chat.example` whose web pages may use the endpoint from a browser.
    `*`: every page that the browser's user opens, even if the endpoint listens only on loopback.
    Default: no pages of other origins."""

    allowed_hosts: Annotated[
        tuple[Annotated[str, AfterValidator(_allowed_host)], ...], Field(strict=False)
    ] = ()
    """Names that a request's Host header may have besides those of loopback, such as `api.example`
    for an endpoint behind a proxy. `*`: all names. Default: if the endpoint listens on loopback, no
    further names; else all names."""

    limits: LimitSpec = LimitSpec()
    """Limits of one request to the endpoint: its tokens, time, body and priority."""

    drain_s: float = Field(default=30.0, ge=0, le=86_400, allow_inf_nan=False)
    """Seconds that running answers, and running calls of the router service, have to finish when
    the cluster ends. After that, they end with an error. New requests are refused at once."""

    @model_validator(mode="after")
    def _all_or_some(self) -> EndpointSpec:
        if "*" in self.cors_origins and len(self.cors_origins) > 1:
            raise ValueError("cors_origins: '*' allows all origins; remove the others")
        if "*" in self.allowed_hosts and len(self.allowed_hosts) > 1:
            raise ValueError("allowed_hosts: '*' allows all hosts; remove the others")
        return self


class TimeoutSpec(Part):
    """How long the cluster waits for its own start, for a missing expert, and for a silent host."""

    expert_s: Seconds = 60.0
    """Seconds that a request waits for an expert that no host can compute, for example while a host
    restarts. After that, the request ends with an error."""

    attempt_s: Seconds = 2.0
    """Seconds that a router waits for a host's answer to a call. After that, the router sends the
    call to another replica, and waits twice as long at each further attempt."""

    start_s: Seconds = 300.0
    """Seconds in which the whole cluster must have started, else `up` fails. The same limit holds
    for a trunk that a request starts (`trunk.min_replicas: 0`)."""

    @property
    def policy(self) -> RouterPolicy:
        return RouterPolicy(deadline_s=self.expert_s, attempt_s=min(self.attempt_s, self.expert_s))
