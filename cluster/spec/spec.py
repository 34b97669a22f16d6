"""The cluster's spec: one YAML file, validated as a whole before anything is started.

Unknown keys and impossible values are errors that name the key's path (`hosts.0.count: ...`). Every
field except the models has a default that works on one machine.
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
    """The Ray to run on; ``local`` starts one inside the process of `moesaic up`.

    Anybody who can connect to a Ray without token authentication can run programs on all its
    machines. Such a Ray is refused unless ``insecure: true`` is set.
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
    """The address on which hosts listen, and the transport of tensors between routers and hosts.

    Transports: ``shm`` is shared memory and works on one machine, ``grpc`` works everywhere.
    ``group`` uses torch.distributed (NCCL between GPUs, else gloo), ``device`` keeps tensors on
    GPUs. ``auto`` is ``shm`` on one machine and ``grpc`` between machines.
    """

    bind: Address = "127.0.0.1"
    transport: TransportChoice = "auto"

    @model_validator(mode="after")
    def _groups_need_an_address(self) -> NetworkSpec:
        if self.transport == "group" and self.bind in ("0.0.0.0", "::", "[::]"):
            raise ValueError(
                f"transport: hosts of a group must know each other's address, and bind: "
                f"{self.bind!r} names none; set an address, or 'node' for each node's own"
            )
        return self


class ModelSpec(Part):
    """One model: a folder, a hub id, or ``demo``.

    After ``idle_s`` without a request its experts leave the hosts; the first call brings them back.
    ``experts_per_token`` sets fewer experts than the model's own number: faster, at lower quality.
    A request may set another number, down to ``min_experts_per_token``. Requests to the endpoint
    may use one of the ``aliases``; answers have the model's name.
    """

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
    """A group of identical hosts.

    ``slots`` and ``memory_gb`` limit the experts on one host. If neither is set, a host has room
    for its even share of all replicas plus a quarter. ``domain`` names what fails together; if it
    is empty, each host fails alone. ``emulate`` makes each batch take the time of another device;
    ``threads`` is 1 then by default. The group starts with ``count`` hosts, and the autoscaler
    keeps it between ``min_count`` and ``max_count``; both are ``count`` by default.
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
        # Experiments with emulated devices run many hosts on few cores.
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
            raise ValueError(
                "spread: a placement group has a fixed size; remove min_count and max_count"
            )
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
    """When experts are moved between hosts, and what a move may cost.

    ``redundancy`` failure domains can be lost at once without losing an expert. A layer whose
    balancedness is below ``enough`` is improved up to ``target``. One plan loads at most ``budget``
    replicas: a fraction of all, or bytes such as "4GB". A layer with little load uses few hosts: it
    gets a further one only for more load than ``fan_out`` times the busiest layer's load per host.
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
    """The whole spec of one cluster."""

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
        """Seconds that running answers and calls have when the cluster ends."""
        return (self.endpoint or EndpointSpec()).drain_s

    @model_validator(mode="after")
    def _consistent(self) -> Spec:
        self._check_names()
        if not self.hosts:
            raise ValueError("hosts: at least one group is needed")
        for model in self.models:
            if model.replicas > self.num_hosts:
                raise ValueError(
                    f"models: {model.name} wants {model.replicas} replicas of each expert on "
                    f"different hosts, but there are {self.num_hosts} hosts"
                )
        return self

    def _check_names(self) -> None:
        """Check that no two models share a name or an alias."""
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
    """Make a spec from plain values; raises SpecError that names the path of each wrong key."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SpecError(f"{source}: a mapping is expected, not {type(values).__name__}")
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        raise SpecError(f"{source}: {problems(error, values)}") from error


def load_spec(path: str | Path) -> Spec:
    """Read the spec in a YAML file, with overrides from the environment (`text.overridden`).

    Raises SpecError.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SpecError(f"{file}: cannot be read: {error}") from error
    try:
        values = yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    return with_environment(values, source=str(file))


def with_environment(values: Any, *, source: str = "spec") -> Spec:
    """Make a spec from plain values with overrides from the environment. Raises SpecError."""
    try:
        values = overridden(values, os.environ)
    except ValueError as error:
        raise SpecError(str(error)) from error
    return parse_spec(values, source=source)
