"""Reports on what happens now: the load of hosts and experts."""

from __future__ import annotations

from .report import (
    Balancedness,
    ExpertId,
    HostState,
    LayerRouting,
    PlacementNumber,
    Report,
)
from .status import TrainingStatus


class ModelActivity(Report):
    """The load of one model."""

    name: str
    """The model's name."""
    assignments_per_s: float
    """Assignments a second of all its layers."""
    balancedness: Balancedness | None
    """How evenly they are spread; null without load."""
    worst_routing: LayerRouting | None = None
    """The layer whose gates spread its tokens least; null before there were enough."""


class HostThroughput(Report):
    """What a host does a second, as means over the last seconds."""

    calls_per_s: float
    """Calls that it answers."""
    rows_per_s: float
    """Rows that it computes: a token of one call is a row."""
    busy_fraction: float
    """Fraction of the time in which its device computes."""


class HostActivity(Report):
    """What a host does now."""

    name: str
    """The host's name."""
    state: HostState
    """Its state."""
    replicas: int
    """Replicas that it holds."""
    queued_rows: int
    """Rows that wait to be computed."""
    throughput: HostThroughput | None
    """What it does a second; null before there are two readings."""


class HotExpert(ExpertId):
    """One of the experts with the most load."""

    assignments_per_s: float
    """Its assignments a second."""
    hosts: list[str]
    """The hosts that hold it."""


class Activity(Report):
    """What the cluster does now: what `moesaic top` shows."""

    placement: PlacementNumber | None
    """The placement in use; null if nothing is placed."""
    router_count: int
    """Routers that follow placements."""
    pending_moves: int
    """Planned replicas that have yet to be loaded."""
    missing_experts: int
    """Experts that no host holds."""
    unprotected_experts: int
    """Experts that the loss of one failure domain takes away."""
    warnings: list[str]
    """What makes no progress, and models whose routing has collapsed, in words."""
    error: str | None
    """The controller's last error, in words."""
    models: list[ModelActivity]
    """Every model's load."""
    hosts: list[HostActivity]
    """What every host does."""
    hottest_experts: list[HotExpert]
    """The experts with the most load, the hottest first."""
    training: TrainingStatus | None = None
    """The run that trains a model; null if there is none."""


class ReplicaReport(Report):
    """A replica of an expert."""

    host: str
    """The host that holds it."""
    share: float
    """Its share of the expert's tokens, 0 to 1; the shares of all replicas add up to 1."""


class AssignmentRates(Report):
    """Assignments a second, as moving averages with three time constants."""

    over_10_s: float
    """The load now."""
    over_60_s: float
    """The load of the last minute."""
    over_600_s: float
    """The usual load."""


class ExpertReport(ExpertId):
    """An expert's replicas, load, and what operators want of it."""

    replicas: list[ReplicaReport]
    """Its replicas in the placement."""
    assignments_per_s: AssignmentRates
    """Its assignments a second."""
    share_of_layer: float | None
    """Its part of its layer's assignments over 10 s, 0 to 1; null if the layer has none."""
    min_replicas: int
    """Smallest number of replicas, as set by `replicate`; 1 by default."""
    pinned_to: list[str]
    """Hosts that must hold the expert, as set by `pin`."""
