"""The cluster's spec: one YAML file, validated as a whole before anything is started.

Unknown keys and impossible values are errors that name the key's path (`hosts.0.count: ...`). Every
field except the models has a default that works on one machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ...proto.errors import SpecError
from ..host.residency import HostLimits
from ..planner.plan import FleetGroup
from ..routing.policy import RouterPolicy
from .balance import BalanceSpec
from .monitoring import MonitoringSpec
from .parts import (
    AutoscaleSpec,
    Cost,
    EmulationSpec,
    EndpointSpec,
    Lending,
    NetworkSpec,
    Part,
    Resources,
    RouterSpec,
    Threads,
    TimeoutSpec,
    TrunkSpec,
)
from .text import StrictLoader, overridden, problems
from .traces import TracesSpec

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
# Hub ids have a slash. No part begins with a dot: clients would resolve "/../" in a URL.
_WORD = r"[A-Za-z0-9][A-Za-z0-9._:-]*"
ModelName = Annotated[str, Field(pattern=rf"^{_WORD}(/{_WORD})*$", max_length=128)]
Dtype = Literal["float32", "bfloat16", "float16"]


class RaySpec(Part):
    """The Ray cluster on which all processes of the cluster run.

    Anybody who can connect to a Ray without token authentication can run programs on all its
    machines. Such a Ray is refused unless ``insecure: true`` is set.
    """

    address: str = "local"
    """The Ray to use. `local`: `moesaic up` starts a Ray of its own and ends it with the cluster.
    `auto`: the Ray that runs on this machine. `HOST:PORT`: the Ray at that address."""

    insecure: bool = False
    """Whether to join a Ray cluster that asks for no token. Default `false`: `up` refuses such a
    Ray, because whoever reaches this Ray commands all its machines (docs/security.md)."""

    @field_validator("address")
    @classmethod
    def _known(cls, value: str) -> str:
        named = re.fullmatch(r"[\w.\-\[\]:]+:(\d{1,5})", value)
        if value in ("local", "auto") or (named and int(named[1]) <= 65_535):
            return value
        raise ValueError(f"{value!r} is neither 'local', 'auto' nor host:port")


class ModelSpec(Part):
    """One model that the cluster serves: its names, where it comes from, how its experts are held.

    Requests to the endpoint may use the ``name`` or one of the ``aliases``; answers have the name.
    """

    name: ModelName
    """The model's name in requests, answers and commands. It may be a hub id with a slash, such as
    `Qwen/Qwen3-30B-A3B`."""

    aliases: Annotated[tuple[ModelName, ...], Field(strict=False)] = ()
    """Other names by which requests to the endpoint may call the model. Answers have its `name`."""

    path: str = Field(min_length=1)
    """Where the model comes from: a folder, an id of the Hugging Face hub, or `demo` for the demo
    model. A folder has the same path on each machine."""

    updates: str | None = Field(default=None, min_length=1)
    """Folder that keeps later weights of the model's experts, which `moesaic expert put` brings;
    the next cluster with this folder uses them. It is made if it is absent, and has the same path
    on each machine. Default `null`: such weights are lost when the cluster ends."""

    dtype: Dtype = "float32"
    """Data type in which the model's trunk and experts are held in memory and computed, whatever
    its checkpoint has."""

    replicas: int = Field(default=1, ge=1, le=1024)
    """Smallest number of replicas of each of the model's experts. Each replica of an expert is on
    another host."""

    exact: bool = False
    """Whether the model's results are the same to the bit, whatever the placement and the batch.
    `true` is slower: a host sends an answer for each expert of a token, not one for each token."""

    idle_s: Annotated[float, Field(ge=1, le=31_536_000)] | None = None
    """Seconds without a request after which the model's experts leave the hosts' memory. The next
    request waits until they are loaded again. Default `null`: the experts never leave."""

    train: bool = False
    """Whether the model's experts can be trained. They keep a layout in memory that gradients can
    read, so calls may take longer. It needs hosts on CPUs, and a checkpoint that is not
    quantised."""

    experts_per_token: int | None = Field(default=None, ge=1)
    """How many experts compute a token, if the request sets no number: those with the largest gate
    weights. Fewer experts are faster, at lower quality. Default `null`: as the model says."""

    min_experts_per_token: int | None = Field(default=None, ge=1)
    """Smallest number of experts per token that a request may ask for. Default `null`: the number
    of experts of a request that sets no number."""

    @model_validator(mode="after")
    def _ordered(self) -> ModelSpec:
        least, usual = self.min_experts_per_token, self.experts_per_token
        if least is not None and usual is not None and least > usual:
            raise ValueError("min_experts_per_token <= experts_per_token must hold")
        if self.train and self.updates is not None:
            raise ValueError(
                "updates: the folder cannot keep updates of trained weights, which are in no file; "
                "export the trained model, and leave out updates or train"
            )
        return self


class HostGroup(Resources):
    """A group of identical expert hosts: what each reserves, holds, computes and costs.

    The group starts with ``count`` hosts. The autoscaler keeps it between ``min_count`` and
    ``max_count``, and never changes its size if neither is set.
    """

    count: int = Field(default=2, ge=1, le=4096)
    """Number of hosts of this group when the cluster starts."""

    min_count: int | None = Field(default=None, ge=1, le=4096)
    """Smallest number of hosts to which the autoscaler shrinks this group. Default `null`:
    `count`."""

    max_count: int | None = Field(default=None, ge=1, le=4096)
    """Largest number of hosts to which the autoscaler or an operator grows this group. Default
    `null`: `count`."""

    cost_per_hour: Cost = 1.0
    """What one host of this group costs per hour, in the unit of `autoscale.max_cost_per_hour`. The
    autoscaler first adds hosts of the group that is cheapest for its speed."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Device on which a host of this group holds and computes experts: `cpu`, `cuda`, `cuda:1` (the
    second GPU), or `auto`: a GPU if there is one, else the CPU."""

    threads: Threads = "auto"
    """CPU threads that one computation of a host uses. `auto`: the machine's cores divided by the
    number of its hosts, or 1 with `emulate`."""

    slots: int | None = Field(default=None, ge=1, le=1 << 24)
    """Largest number of experts that one host of this group may hold. Default `null`: as many as
    fit into `memory_gb`. If `slots` and `memory_gb` are both `null`: a quarter more than the host's
    even share of all replicas."""

    memory_gb: float | None = Field(default=None, gt=0, le=1 << 20, allow_inf_nan=False)
    """Memory that the experts on one host of this group may take, in GiB; `gpu_memory` is for the
    whole process. Default `null`: only `slots` limits them, and on a GPU `gpu_memory`."""

    speed: float = Field(default=1.0, gt=0, le=1e6, allow_inf_nan=False)
    """How fast one host of this group computes, relative to hosts of other groups. The planner
    gives a host of speed 2 twice the load of a host of speed 1."""

    failure_domain: str = ""
    """Failure domain of all hosts of this group: a name for what fails together, such as a machine
    or a rack. Default empty: each host fails alone."""

    placement_group: Literal["none", "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "none"
    """How Ray spreads the hosts of this group over machines: the strategy of a Ray placement group.
    Such a group keeps its size. `none`: Ray places each host independently."""

    max_rows: int | None = Field(default=None, ge=1, le=65_536)
    """Largest number of rows (tokens) in one call to a host of this group. Routers split larger
    calls. Default `null`: 512 on a CPU, 16384 on a GPU."""

    max_batch_rows: int | None = Field(default=None, ge=1, le=1 << 20)
    """Largest number of rows (tokens) in one computation of a host. A host computes waiting calls
    for the same layer together. Default `null`: 1024 on a CPU, 16384 on a GPU."""

    max_queue_rows: int | None = Field(default=None, ge=1, le=1 << 24)
    """Largest number of rows (tokens) that may wait in a host's queue. The host refuses further
    calls. Routers send a refused call to another replica, or again later. Default `null`: 16384 on
    a CPU, 131072 on a GPU."""

    lending: Lending | None = None
    """Whether hosts of this group lend their experts' memory to trunks on their machine, as in
    `network.lending`. Default `null`: as `network.lending` says. Hosts that emulate another device
    never lend."""

    emulate: EmulationSpec | None = None
    """Another device that the hosts of this group imitate, for experiments: a batch takes as long
    as that device would take. Default `null`: the hosts imitate no device."""

    @model_validator(mode="before")
    @classmethod
    def _one_thread(cls, values: Any) -> Any:
        # Experiments with emulated devices run many hosts on few cores.
        if isinstance(values, dict) and values.get("emulate") and "threads" not in values:
            return {**values, "threads": 1}
        return values

    @model_validator(mode="after")
    def _ordered(self) -> HostGroup:
        stated = [n for n in (self.max_rows, self.max_batch_rows, self.max_queue_rows) if n]
        if stated != sorted(stated):
            raise ValueError("max_rows <= max_batch_rows <= max_queue_rows must hold")
        if not self.least <= self.count <= self.most:
            raise ValueError("min_count <= count <= max_count must hold")
        self.check_card(self.device)
        if self.placement_group != "none" and self.least != self.most:
            raise ValueError(
                "placement_group: a placement group has a fixed size; remove min_count and "
                "max_count, or set placement_group: none"
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
            domain=self.failure_domain,
            fixed=self.placement_group != "none",
            needs=", ".join(needs) or "nothing",
        )

    @property
    def limits(self) -> HostLimits:
        return HostLimits(
            max_rows=self.max_rows,
            max_batch_rows=self.max_batch_rows,
            max_queue_rows=self.max_queue_rows,
            emulate=self.emulate.emulation() if self.emulate is not None else None,
        )


class Spec(Part):
    """The whole spec of one cluster. Each key without a value in the file has its default."""

    name: Name = "local"
    """The cluster's name. `moesaic status --name NAME` and the other commands find the cluster by
    this name."""

    ray: RaySpec = RaySpec()
    """The Ray cluster on which all processes run: one that `moesaic up` starts, or one that already
    runs."""

    network: NetworkSpec = NetworkSpec()
    """Where hosts listen, and how tensors travel between trunks and hosts."""

    models: Annotated[tuple[ModelSpec, ...], Field(strict=False)] = ()
    """The models that the cluster serves. The list may be empty: a program can attach models
    later."""

    hosts: Annotated[tuple[HostGroup, ...], Field(strict=False)] = (HostGroup(),)
    """Groups of identical expert hosts. These processes hold the models' experts and compute them.
    Default: one group of two hosts."""

    trunk: TrunkSpec = TrunkSpec()
    """The processes that hold a model's trunk: everything but the model's routed experts. Each
    model has its own trunk processes."""

    endpoint: EndpointSpec | None = EndpointSpec()
    """The HTTP endpoint with an OpenAI-style API. `null`: the cluster has no endpoint."""

    monitoring: MonitoringSpec | None = MonitoringSpec()
    """The address at which the endpoint's process serves the page, `/status` and `/metrics`.
    `null`: the process serves none of them."""

    traces: TracesSpec = TracesSpec()
    """Which requests are traced, and where their spans are sent."""

    router: RouterSpec | None = None
    """The gRPC router service, for clients that send hidden states instead of text. Default `null`:
    the cluster has no router service."""

    timeouts: TimeoutSpec = TimeoutSpec()
    """How long the cluster waits for its own start, for a missing expert, and for the answer of one
    host."""

    balance: BalanceSpec = BalanceSpec()
    """When the controller moves experts between hosts, how even the load has to be, and how much
    one change may load."""

    autoscale: AutoscaleSpec = AutoscaleSpec()
    """When hosts are added and removed, in host groups whose `min_count` and `max_count` differ."""

    @property
    def drain_s(self) -> float:
        """Seconds that running answers and calls have when the cluster ends."""
        return (self.endpoint or EndpointSpec()).drain_s

    @property
    def trains(self) -> bool:
        """Whether a model of the spec can be trained."""
        return any(model.train for model in self.models)

    @property
    def router_policy(self) -> RouterPolicy:
        """The deadlines and limits of the cluster's routers."""
        lending = {self.lending_of(group) for group in self.hosts} - {"never"}
        return replace(
            self.timeouts.policy,
            orphan_s=self.balance.host_timeout_s,
            splits_lent=lending == {"auto"},
        )

    def lending_of(self, group: HostGroup) -> Lending:
        """Return whether hosts of a group lend: as it says, or else as `network.lending` says."""
        return self.network.lending if group.lending is None else group.lending

    @property
    def lends(self) -> bool:
        """Whether any host may lend to a trunk."""
        return any(self.lending_of(group) != "never" for group in self.hosts)

    @model_validator(mode="after")
    def _consistent(self) -> Spec:
        self._check_names()
        if not self.hosts:
            raise ValueError(
                "hosts: the list is empty; give at least one host group, or leave out hosts"
            )
        for number, group in enumerate(self.hosts):
            if self.lending_of(group) == "always":
                self._check_lending(number, group)
        for model in self.models:
            if model.replicas > self.num_hosts:
                raise ValueError(
                    f"models: {model.name} wants {model.replicas} replicas of each expert on "
                    f"different hosts, but the spec has {self.num_hosts} hosts; lower replicas, or "
                    "raise hosts.0.count"
                )
        return self

    def _check_lending(self, number: int, group: HostGroup) -> None:
        """Check that hosts of a group can lend, as the spec says that they always do."""
        here, there = group.device, self.trunk.device
        if group.emulate is not None:
            why = "hosts that emulate another device never lend"
        elif {here.partition(":")[0], there.partition(":")[0]} == {"cpu", "cuda"}:
            why = f"hosts on {here} lend to trunks on {here}, not {there}"
        elif self.network.transport not in ("auto", "shm"):
            why = f"it needs shared memory, and network.transport is {self.network.transport!r}"
        else:
            return
        raise ValueError(f"hosts.{number}.lending: 'always' is not possible: {why}; use 'auto'")

    def _check_names(self) -> None:
        """Check that no two models share a name or an alias."""
        places: dict[str, str] = {}
        for number, model in enumerate(self.models):
            names = {f"models.{number}.name": model.name}
            names |= {f"models.{number}.aliases.{n}": one for n, one in enumerate(model.aliases)}
            for place, name in names.items():
                if name in places:
                    raise ValueError(
                        f"{place}: {name!r} is taken: {places[name]} is the same; choose "
                        "another name"
                    )
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
