"""Reports on what changes a placement: plans, changes and drains."""

from __future__ import annotations

from .report import Balancedness, ExpertId, OpenEnum, Report


class MoveKind(OpenEnum):
    """Why a plan loads a replica."""

    PLACE = "place"
    RESTORE = "restore"
    DRAIN = "drain"
    PROTECT = "protect"
    CONSTRAINT = "constraint"
    SPARE = "spare"
    BALANCE = "balance"


class PlannedMove(ExpertId):
    """One replica that a plan loads."""

    host: str
    """The host that loads the replica."""
    kind: MoveKind
    """What the replica is for."""
    reason: str
    """Why the plan loads it, in words."""
    weight_bytes: int
    """Size of the expert's weights."""
    replaces: list[ExpertId]
    """Experts whose replicas on that host make room."""


class PlannedDrop(ExpertId):
    """A replica that leaves a host that stays."""

    host: str
    """The host that drops the replica."""


class LayerPlan(Report):
    """What a plan does for one layer."""

    model: str
    """The model's name."""
    layer: int
    """The layer's number."""
    balancedness_before: float
    """Balancedness of the layer's load now."""
    balancedness_after: float
    """Balancedness of the same load under the plan."""


class UpkeepReport(Report):
    """What one more replica of an expert costs a training run in each step."""

    model: str
    """The model that is trained."""
    replica_bytes: int
    """Bytes that a step moves for it: its gradient to each owner, and the new weights back. On a
    host that owns the expert it is less."""
    replica_s: float
    """How long that is planned to take."""
    step_s: float
    """How long a step takes."""


class PlanReport(Report):
    """What `rebalance` would do now."""

    moves: list[PlannedMove]
    """Replicas to load, in their order."""
    drops: list[PlannedDrop]
    """Replicas that leave hosts and make room."""
    weight_bytes: int
    """Size of the weights to load."""
    expected_s: float
    """How long the loading is expected to take."""
    balancedness_before: Balancedness | None
    """Balancedness of the load now; null if no model is served."""
    balancedness_after: Balancedness | None
    """Balancedness of the same load under the plan."""
    layers: list[LayerPlan]
    """Each layer's balancedness."""
    unprotected_experts_before: int
    """Experts that the loss of one failure domain takes away now."""
    unprotected_experts_after: int
    """Experts that have one replica under the plan."""
    unplaced_experts: list[ExpertId]
    """Experts for which no host has room."""
    lacking_bytes: int
    """Memory that the hosts lack for one more replica of each expert that should have one."""
    upkeep: UpkeepReport | None = None
    """What replicas of the model that is trained cost; null if no run has done a step."""


class ChangePhase(OpenEnum):
    """How far a change is, or how it ended."""

    LOADING = "loading"  # hosts are loading the planned replicas
    DONE = "done"  # all planned replicas are there
    FAILED = "failed"  # some replicas could not be loaded; the others are there
    SUPERSEDED = "superseded"  # a later change began before this one was done
    ROLLED_BACK = "rolled_back"  # an operator returned to the placement from before


class MeasuredEffect(Report):
    """The effect of a change on the load that was counted after its end."""

    window_s: float
    """How long the load was counted."""
    balancedness_unchanged: Balancedness
    """Balancedness of that load under the shares from before the change."""
    balancedness_changed: Balancedness
    """Balancedness of the same load under the new shares."""
    host_assignments_per_s_before: dict[str, float]
    """Assignments a second that each host answered before the change."""
    host_assignments_per_s_after: dict[str, float]
    """Assignments a second that each host answered after it."""


class ChangeReport(Report):
    """A change of the placement, with its progress."""

    id: int
    """The number of the change, which the commands take."""
    initiator: str
    """Who began it: a user's name, `balancer`, or `controller`."""
    reason: str
    """Why, in words."""
    phase: ChangePhase
    """How far it is, or how it ended."""
    age_s: float
    """Time since the change began."""
    duration_s: float | None
    """How long the change took; null while it loads."""
    total_moves: int
    """Replicas that it loads."""
    pending_moves: int
    """Replicas that have yet to be loaded; 0 when it has ended."""
    weight_bytes: int
    """Size of the weights of all its moves."""
    balancedness_before: Balancedness | None
    """Balancedness when it began; null without load."""
    balancedness_predicted: Balancedness | None
    """Balancedness that it was to bring; null without load."""
    errors: list[str]
    """What could not be loaded or has no room, in words."""
    measured: MeasuredEffect | None
    """Its effect; null if it is not measured yet, or cannot be."""

    @property
    def under_way(self) -> bool:
        """Whether it has not ended yet."""
        return self.phase is ChangePhase.LOADING


class DrainPhase(OpenEnum):
    """How far the drain of a host is."""

    NOT_DRAINED = "not_drained"
    DRAINING = "draining"
    NO_ROOM = "no_room"  # other hosts have no room for the rest; it goes on when there is room
    DONE = "done"


class DrainReport(Report):
    """The progress of a drain."""

    host: str
    """The host's name."""
    phase: DrainPhase
    """How far the drain is."""
    remaining_replicas: int
    """Replicas that the host still holds."""
    obstacle: str | None
    """What keeps the rest from moving, in words."""

    @property
    def under_way(self) -> bool:
        """Whether replicas go on leaving the host."""
        return self.phase is DrainPhase.DRAINING
