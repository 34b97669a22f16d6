"""The cluster's spec: one YAML file, validated whole before anything is started.

Unknown keys and impossible values fail with the key's path (`hosts.0.count: ...`). Every field
has a default that works on one machine, apart from the models.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from ...proto.errors import SpecError
from ..control.policy import ControlPolicy
from ..host.residency import HostPolicy
from ..planner.plan import FleetGroup, Policy
from ..routing.transports import TransportChoice
from .parts import (
    Address,
    AutoscaleSpec,
    Cost,
    EmulationSpec,
    EndpointSpec,
    MonitoringSpec,
    Part,
    Resources,
    RouterSpec,
    Seconds,
    Threads,
    TimeoutSpec,
    TrunkSpec,
)
from .text import StrictLoader, bytes_of, overridden, part_or_bytes, problems

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
# Hub ids have a slash. No part begins with a dot: clients would resolve "/../" in a URL.
_WORD = r"[A-Za-z0-9][A-Za-z0-9._:-]*"
ModelName = Annotated[str, Field(pattern=rf"^{_WORD}(/{_WORD})*$", max_length=128)]
Budget = Annotated[float | str, PlainValidator(part_or_bytes)]
Dtype = Literal["float32", "bfloat16", "float16"]


class RaySpec(Part):
    """Where Ray runs. ``local`` starts one inside the process of `moesaic up`.

    Whoever reaches a Ray runs any program on all its machines, unless it asks for a token. One that
    does not is refused; ``insecure: true`` takes it all the same.
    """

    address: str = "local"
    insecure: bool = False

    @field_validator("address")
    @classmethod
    def _known(cls, value: str) -> str:
        named = re.fullmatch(r"[\w.\-\[\]:]+:(\d{1,5})", value)
        if value in ("local", "auto") or (named and int(named[1]) <= 65_535):
            return value
        raise ValueError(f"{value!r} is neither 'local', 'auto' nor host:port")


class NetworkSpec(Part):
    """Where hosts listen for gRPC and for groups: an address, or ``node`` for each node's own.

    ``transport``: ``shm`` is memory of one machine, ``grpc`` goes everywhere, with ``group``
    torch.distributed carries tensors (NCCL between GPUs, else gloo), ``device`` keeps them on GPUs;
    ``auto`` is ``shm`` on one machine and ``grpc`` between two.
    """

    bind: Address = "127.0.0.1"
    transport: TransportChoice = "auto"

    @model_validator(mode="after")
    def _groups_need_an_address(self) -> NetworkSpec:
        if self.transport == "group" and self.bind in ("0.0.0.0", "::", "[::]"):
            raise ValueError(
                f"transport: a group meets at an address, and bind: {self.bind!r} is none to reach "
                "a host by; give one, or 'node' for each node's own"
            )
        return self


class ModelSpec(Part):
    """One model: a folder, a hub id, or ``demo``. Its experts leave the hosts when nobody has asked
    for it for ``idle_s``, and come back with the first call. ``experts_per_token`` takes fewer
    experts than the model's own number where a request says nothing, and a request may ask for as
    few as ``min_experts_per_token``: quicker, and of less quality. Requests to the endpoint may use
    one of its ``aliases``; answers have its name."""

    name: ModelName
    aliases: Annotated[tuple[ModelName, ...], Field(strict=False)] = ()
    path: str = Field(min_length=1)
    dtype: Dtype = "float32"
    replicas: int = Field(default=1, ge=1, le=1024)
    exact: bool = False
    idle_s: Annotated[float, Field(ge=1, le=31_536_000)] | None = None
    experts_per_token: int | None = Field(default=None, ge=1)
    min_experts_per_token: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> ModelSpec:
        least, usual = self.min_experts_per_token, self.experts_per_token
        if least is not None and usual is not None and least > usual:
            raise ValueError("min_experts_per_token <= experts_per_token must hold")
        return self


class HostGroup(Resources):
    """Like hosts. ``threads`` are those of one computation, ``auto`` shares the cores out.

    ``slots`` and ``memory_gb`` bound the experts on one host; without both it gets an even part of
    what the models need and a quarter more. ``speed`` is relative to other groups, ``domain`` names
    what fails together; empty, it is the host alone. ``emulate`` lets each batch take the time of
    another device, with one thread if ``threads`` is not given. The group starts with ``count``
    hosts; the autoscaler keeps them between ``min_count`` and ``max_count``, which are ``count`` by
    default.
    """

    count: int = Field(default=2, ge=1, le=4096)
    min_count: int | None = Field(default=None, ge=1, le=4096)
    max_count: int | None = Field(default=None, ge=1, le=4096)
    cost_per_hour: Cost = 1.0
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: Threads = "auto"
    slots: int | None = Field(default=None, ge=1, le=1 << 24)
    memory_gb: float | None = Field(default=None, gt=0, le=1 << 20, allow_inf_nan=False)
    speed: float = Field(default=1.0, gt=0, le=1e6, allow_inf_nan=False)
    domain: str = ""
    spread: Literal["none", "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "none"
    max_rows: int = Field(default=512, ge=1, le=65_536)
    max_batch_rows: int = Field(default=1024, ge=1, le=1 << 20)
    max_queue_rows: int = Field(default=16_384, ge=1, le=1 << 24)
    emulate: EmulationSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_thread(cls, values: Any) -> Any:
        # Emulated devices are many on few cores.
        if isinstance(values, dict) and values.get("emulate") and "threads" not in values:
            return {**values, "threads": 1}
        return values

    @model_validator(mode="after")
    def _ordered(self) -> HostGroup:
        if not self.max_rows <= self.max_batch_rows <= self.max_queue_rows:
            raise ValueError("max_rows <= max_batch_rows <= max_queue_rows must hold")
        if not self.least <= self.count <= self.most:
            raise ValueError("min_count <= count <= max_count must hold")
        if self.spread != "none" and self.least != self.most:
            raise ValueError("a placement group (spread) is fixed: leave min_count, max_count out")
        return self

    @property
    def least(self) -> int:
        return self.count if self.min_count is None else self.min_count

    @property
    def most(self) -> int:
        return self.count if self.max_count is None else self.max_count

    @property
    def fleet(self) -> FleetGroup:
        wants = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        needs = [f"{amount:g} {name}" for name, amount in wants.items() if amount]
        needs += [f"{name}={value}" for name, value in self.labels.items()]
        return FleetGroup(
            count=self.count,
            min_count=self.least,
            max_count=self.most,
            cost_per_hour=self.cost_per_hour,
            slots=self.slots,
            memory_bytes=None if self.memory_gb is None else int(self.memory_gb * 2**30),
            speed=self.speed,
            domain=self.domain,
            fixed=self.spread != "none",
            needs=", ".join(needs) or "nothing",
        )

    @property
    def policy(self) -> HostPolicy:
        return HostPolicy(
            max_rows=self.max_rows,
            max_batch_rows=self.max_batch_rows,
            max_queue_rows=self.max_queue_rows,
            emulate=self.emulate.emulation() if self.emulate is not None else None,
        )


class BalanceSpec(Part):
    """When experts move, and what a move may cost.

    ``redundancy`` failure domains can be lost at once without losing an expert. A layer whose
    balancedness is below ``enough`` is improved up to ``target``, with at most ``budget`` of all
    replicas loaded anew each time: a part of them, or bytes, as "4GB". A layer takes a further host
    for more load only than the part ``fan_out`` of what the layer with the most load has on each
    host.
    """

    auto: bool = True
    redundancy: int = Field(default=0, ge=0, le=64)
    enough: float = Field(default=0.95, gt=0, le=1)
    target: float = Field(default=0.98, gt=0, le=1)
    budget: Budget = 0.05
    fan_out: float = Field(default=0.05, ge=0, le=1)
    every_s: Seconds = 10.0
    horizon_s: Seconds = 60.0
    gone_s: Seconds = 30.0
    lease_s: Seconds = 10.0
    load_mb_per_s: float = Field(default=200.0, gt=0, le=1e9, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> BalanceSpec:
        if self.enough > self.target:
            raise ValueError("enough <= target must hold")
        return self

    @property
    def policy(self) -> ControlPolicy:
        return ControlPolicy(
            balance=Policy(
                redundancy=self.redundancy,
                enough=self.enough,
                target=self.target,
                horizon_s=self.horizon_s,
                fan_out=self.fan_out,
            ),
            auto=self.auto,
            every_s=self.every_s,
            budget=self.budget if isinstance(self.budget, float) else 1.0,
            budget_bytes=bytes_of(self.budget) if isinstance(self.budget, str) else None,
            gone_s=self.gone_s,
            lease_s=self.lease_s,
            bytes_per_s=self.load_mb_per_s * 1e6,
        )


class Spec(Part):
    """A cluster."""

    name: Name = "local"
    ray: RaySpec = RaySpec()
    network: NetworkSpec = NetworkSpec()
    models: Annotated[tuple[ModelSpec, ...], Field(strict=False)] = ()
    hosts: Annotated[tuple[HostGroup, ...], Field(strict=False)] = (HostGroup(),)
    trunk: TrunkSpec = TrunkSpec()
    endpoint: EndpointSpec | None = EndpointSpec()
    monitoring: MonitoringSpec | None = MonitoringSpec()
    router: RouterSpec | None = None
    timeouts: TimeoutSpec = TimeoutSpec()
    balance: BalanceSpec = BalanceSpec()
    autoscale: AutoscaleSpec = AutoscaleSpec()

    @property
    def drain_s(self) -> float:
        """How long answers and calls may go on when the cluster ends."""
        return (self.endpoint or EndpointSpec()).drain_s

    @model_validator(mode="after")
    def _consistent(self) -> Spec:
        self._check_names()
        if not self.hosts:
            raise ValueError("hosts: at least one group is needed")
        for model in self.models:
            if model.replicas > self.num_hosts:
                raise ValueError(
                    f"models: {model.name} wants {model.replicas} replicas of each expert, "
                    f"but there are {self.num_hosts} hosts, and none holds one twice"
                )
        return self

    def _check_names(self) -> None:
        """A request's name must say which model is meant."""
        places: dict[str, str] = {}
        for number, model in enumerate(self.models):
            names = {f"models.{number}.name": model.name}
            names |= {f"models.{number}.aliases.{n}": one for n, one in enumerate(model.aliases)}
            for place, name in names.items():
                if name in places:
                    raise ValueError(f"{place}: {name!r} is taken: {places[name]}")
                places[name] = place

    @property
    def num_hosts(self) -> int:
        return sum(group.count for group in self.hosts)


def parse_spec(values: Any, *, source: str = "spec") -> Spec:
    """A spec from plain values. Raises SpecError that names each key's path."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SpecError(f"{source}: a mapping is expected, not {type(values).__name__}")
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        raise SpecError(f"{source}: {problems(error, values)}") from error


def load_spec(path: str | Path) -> Spec:
    """The spec in a YAML file, with overrides from the environment (`spec_text.overridden`). Raises
    SpecError."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SpecError(f"{file}: cannot be read: {error}") from error
    try:
        values = yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    try:
        values = overridden(values, os.environ)
    except ValueError as error:
        raise SpecError(str(error)) from error
    return parse_spec(values, source=str(file))
