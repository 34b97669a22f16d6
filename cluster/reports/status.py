"""Reports on a whole cluster."""

from __future__ import annotations

from pydantic import Field

from .placing import ChangeReport
from .report import (
    Balancedness,
    ExpertId,
    HostState,
    LayerRouting,
    OpenEnum,
    PlacementNumber,
    Report,
)
from .scaling import ScalingStatus


class ControllerStatus(Report):
    """How the controller's loop is doing."""

    term: int
    """The controller's term; a restarted controller has a higher one."""
    ticks: int
    """Ticks of its loop since its start."""
    tick_age_s: float
    """Time since the last tick."""
    failing: bool
    """Whether the last tick or the last plan ended with an error."""
    error: str | None
    """That error, in words."""


class BalancingStatus(Report):
    """The balancer, and the change that is under way."""

    automatic: bool
    """Whether the balancer moves replicas by itself."""
    plan_age_s: float | None
    """Time since the planner was last asked; null if it never was."""
    planning_s: float
    """How long it has been at work on the current plan; 0 if there is none."""
    failed_plans: int
    """Plans that failed in a row."""
    arrival_age_s: float | None
    """Time since a planned replica last arrived; null if none did."""
    pending_moves: int
    """Planned replicas that have yet to be loaded."""
    draining_hosts: list[str]
    """Hosts that must become empty: drained by operators, or leaving."""
    last_change: ChangeReport | None
    """The last change; null if there was none."""


class PathStatus(Report):
    """How one router reaches one host."""

    host: str
    """The host's name."""
    transport: str | None
    """What carries calls that are sent: shm, cuda, grpc, gloo, nccl; null while not connected."""
    lent: bool
    """Whether the router computes with this host's memory, and sends nothing for what it has."""
    reason: str | None
    """Why calls are sent; null if the memory is lent."""


class RouterStatus(Report):
    """A router that follows placements."""

    name: str
    """The router's name."""
    placement: PlacementNumber | None
    """The placement that it uses; null if it has none yet."""
    paths: list[PathStatus] = Field(default_factory=list)
    """How it reaches each host."""


class RouterServiceState(OpenEnum):
    """The state of the router service."""

    STARTING = "starting"
    UP = "up"
    RESTARTING = "restarting"
    UNKNOWN = "unknown"  # it could not be checked


class RouterServiceProcess(Report):
    """What the router service's process reports; counts are since its start."""

    pid: int
    """Its process id."""
    calls: int
    """Calls that were answered."""
    rows: int
    """Rows that were computed."""
    batches: int
    """Batches that were computed."""
    merged_batches: int
    """Batches with rows of several calls."""
    refused_calls: int
    """Calls that were refused because the service was full."""
    expired_calls: int
    """Calls that ended at their deadline."""
    expert_waits: int
    """How often rows had to wait for an expert."""
    held_calls: int
    """Calls that wait or are computed now."""
    held_bytes: int
    """Size of their tensors and answers."""


class RouterServiceStatus(Report):
    """The router service."""

    address: str
    """Its address."""
    state: RouterServiceState
    """Its state."""
    error: str | None
    """Why its state is unknown, in words."""
    process: RouterServiceProcess | None
    """What its process last reported; null while it starts."""


class HostProcess(Report):
    """What a host's process last reported; counts are since its start."""

    incarnation: int
    """The number of this start of the host."""
    node: str
    """Ray's id of its machine."""
    pid: int
    """Its process id."""
    device: str
    """The device that it computes on."""
    replicas: int
    """Replicas that it holds."""
    loading_replicas: int
    """Replicas that it is loading."""
    weight_bytes: int
    """Size of the weights that it holds."""
    rss_bytes: int
    """Resident memory of the process."""
    calls: int
    """Calls that it answered."""
    rows: int
    """Rows that it computed: a token of one call is a row."""
    assignments: int
    """Assignments that it computed: a row counts once for each of its experts."""
    batches: int
    """Batches that it computed."""
    refused_calls: int
    """Calls that it refused."""
    queued_rows: int
    """Rows that wait to be computed."""
    busy_s: float
    """How long its device has computed."""
    connected_routers: int
    """Routers that are connected to it."""
    overrun_batches: int
    """Batches whose arithmetic took longer than the emulated device."""
    worst_overrun_s: float
    """The largest such excess."""
    total_late_s: float
    """Sum of the delays of answers that an emulated device gave late."""
    adopted_replicas: int = 0
    """Replicas that it took over from the memory of its killed predecessor, without loading."""
    card_used_bytes: int | None = None
    """Memory of its GPU that experts and PyTorch take; null on a CPU."""
    card_limit_bytes: int | None = None
    """Memory of its GPU that the whole process may take (`hosts[].gpu_memory`, or a part in
    `num_gpus`); null: no limit."""
    received_bytes: int = 0
    """Size of the tensors of the calls that it answered."""
    sent_bytes: int = 0
    """Size of the tensors of its answers."""


class NodeStatus(Report):
    """A machine on which hosts run."""

    node: str
    """Ray's id of the machine."""
    hosts: list[str]
    """Hosts that run there."""
    weight_bytes: int
    """Size of the weights that they hold."""
    rss_bytes: int
    """Resident memory of their processes, with these weights."""
    memory_bytes: int
    """Memory that the machine or its container may use, with swap."""
    free_bytes: int
    """What is free of it."""


class CardStatus(Report):
    """A GPU, or an instance of one in MIG mode, on which hosts compute."""

    card: str
    """Its UUID, or the name of the instance."""
    node: str
    """Ray's id of its machine."""
    hosts: list[str]
    """Hosts that compute there."""
    weight_bytes: int
    """Size of the weights that they hold."""
    used_bytes: int
    """Memory that they take, without their CUDA contexts."""
    limit_bytes: int | None
    """Memory that they may take together; null if one of them has no limit."""
    memory_bytes: int
    """All memory of the card."""
    free_bytes: int
    """What is free of it. Trunks and other programs on the card take the rest."""


class HostStatus(Report):
    """A host."""

    name: str
    """The host's name."""
    state: HostState
    """Its state."""
    obstacle: str | None
    """What keeps it from starting or leaving, in words."""
    error: str | None
    """Its last error, in words."""
    process: HostProcess | None
    """What its process last reported; null while it is not running."""
    slots: int | None = None
    """Replicas for which it has room; null: its memory decides."""
    memory_limit_bytes: int | None = None
    """Memory that its experts may take, from the spec; null: only its slots bound them."""
    ready: bool | None = None
    """Whether it takes calls: the controller lists it, and its listener has answered a probe within
    the last seconds. null: the cluster is older and does not say."""
    unready_reason: str | None = None
    """Why it is not ready, in words; null if it is."""


class ModelStatus(Report):
    """A model that the cluster serves."""

    name: str
    """The model's name."""
    path: str | None
    """Its folder; null if it was attached from memory."""
    dtype: str
    """The dtype of its experts."""
    min_replicas: int
    """Replicas that each expert has at least."""
    exact: bool
    """Whether answers are added up in a fixed order."""
    layers: int
    """Layers with experts."""
    experts: int
    """Experts of all layers."""
    asleep: bool
    """Whether its experts have left the hosts because the model had no request for `idle_s`."""
    missing_experts: int
    """Its experts that no host holds."""
    updated_experts: int = 0
    """Its experts whose weights were updated or trained since they were read from the
    checkpoint."""
    volatile_experts: int = 0
    """Of the updated ones, those whose weights only hosts have, because they were trained, or
    because the spec gives the model no `updates` folder: they are lost with their last host, and
    with the cluster."""
    routing: list[LayerRouting] = Field(default_factory=list)
    """How the gates of each layer spread its tokens; without layers that had too few."""


class TrainingStatus(Report):
    """The run that trains a model of the cluster."""

    run: int
    """The run's number."""
    model: str
    """The model's name."""
    initiator: str
    """Who began it."""
    age_s: float
    """Time since it began."""
    version: int
    """The version of the model's experts that is served."""
    steps: int
    """Versions that it has brought so far, each with one step."""
    owned_tensors: dict[str, int]
    """How many experts and blocks of the trunk each host owns: it keeps their masters and the
    optimizer's state."""
    attempt: int = 0
    """Which attempt at the next step is under way: a second one means that something was lost. 0:
    none has begun."""
    workers: int = 0
    """How many processes compute it."""
    unprotected_tensors: int = 0
    """How many experts and blocks of the trunk have a single owner: if that host is lost, the run
    goes back to a checkpoint. With redundancy they are few, until they were copied again."""
    step_s: float | None = None
    """How long a step takes, the mean of the last ones; null before the first one is done."""
    tokens_per_s: float | None = None
    """Tokens that these steps have learned from, for each second."""
    balancedness: Balancedness | None = None
    """How evenly the load of the model's layers is spread; null without load."""
    owned_bytes: dict[str, int] = Field(default_factory=dict)
    """How much memory that takes on each host: masters, optimizer's state, and gradients in a step.
    Empty before the run has told."""


class MissingExpert(ExpertId):
    """An expert that no host holds."""

    reason: str
    """Why, in words."""


class ClusterStatus(Report):
    """The state of a cluster, as its controller knows it: what `Cluster.status` returns."""

    placement: PlacementNumber | None
    """The placement in use; null if nothing is placed."""
    controller: ControllerStatus
    """The controller's loop."""
    warnings: list[str]
    """What makes no progress, and models whose routing has collapsed, in words."""
    balancing: BalancingStatus
    """The balancer."""
    scaling: ScalingStatus
    """The number of hosts."""
    routers: list[RouterStatus]
    """Routers that follow placements."""
    router_service: RouterServiceStatus | None
    """The router service; null if the spec has none."""
    hosts: list[HostStatus]
    """All hosts."""
    models: list[ModelStatus]
    """All models."""
    balancedness: Balancedness | None
    """How evenly the load of all layers is spread; null without load."""
    missing_experts: int
    """Experts that no host holds."""
    missing_examples: list[MissingExpert]
    """The first ten of them."""
    unprotected_experts: int
    """Experts that the loss of one failure domain takes away."""
    nodes: list[NodeStatus] = Field(default_factory=list)
    """The machines on which hosts run, and their memory."""
    cards: list[CardStatus] = Field(default_factory=list)
    """The GPUs on which hosts compute, and their memory."""
    training: TrainingStatus | None = None
    """The run that trains a model; null if there is none."""

    @property
    def processes(self) -> dict[str, HostProcess]:
        """The process of each host that is running, by the host's name."""
        return {host.name: host.process for host in self.hosts if host.process is not None}


class EngineWork(Report):
    """What the engine of a trunk does."""

    running_requests: int
    """Requests in its batch."""
    waiting_requests: int
    """Requests that wait for the batch."""
    parked_requests: int
    """Of the waiting ones, those whose expert no host has."""
    steps: int
    """Steps since its start."""
    restarts: int
    """Restarts after failed steps."""
    beat_age_s: float
    """Time since its loop last looked for work."""
    free_cache_fraction: float
    """Free part of the KV cache, 0 to 1."""


class EngineStatus(Report):
    """The engine of a model's trunk."""

    healthy: bool
    """Whether the trunk answers and its engine runs, or will start with the next request."""
    starts_on_demand: bool
    """Whether trunks may scale to zero. Such a trunk is not asked, which would keep it awake."""
    last_error: str | None
    """The last error, in words."""
    work: EngineWork | None
    """What the engine does; null if the trunk was not asked or did not answer."""


class EndpointStatus(Report):
    """The state of a cluster with an endpoint: what `/status` and `Client.status` return."""

    healthy: bool
    """Whether all engines are healthy."""
    engines: dict[str, EngineStatus]
    """Each model's engine."""
    cluster: ClusterStatus | None
    """The cluster; null if the endpoint serves without one."""


class StatusDocument(Report):
    """What `moesaic status --json` prints."""

    name: str
    """The cluster's name."""
    url: str | None
    """The endpoint's address; null if the spec has none."""
    monitoring_url: str | None
    """The address of `/status` and `/metrics`; null if this machine can reach none."""
    healthy: bool | None
    """Whether all engines are healthy; null if this machine cannot reach `/status`."""
    engines: dict[str, EngineStatus] | None
    """Each model's engine; null if this machine cannot reach `/status`."""
    cluster: ClusterStatus | None
    """The cluster."""
