"""What all reports share: how they are read, and the small parts that several of them have."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict


class Report(BaseModel):
    """A frozen value that the controller, the SDK, ``--json`` and ``/status`` share.

    Names of fields stay: fields are added later, with a default, and never renamed or removed. So
    a client reads the reports of older and of newer clusters; fields that it does not know are
    left out.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class OpenEnum(StrEnum):
    """Words for a state or a phase; a word that only a newer cluster knows is kept as it is."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        unknown = str.__new__(cls, value)
        unknown._name_ = unknown._value_ = value
        return unknown

    @property
    def words(self) -> str:
        """The value for people."""
        return self.value.replace("_", " ")


class HostState(OpenEnum):
    """The state of a host, as the controller sees it."""

    STARTING = "starting"
    LOADING = "loading"
    UP = "up"
    NOT_ANSWERING = "not_answering"
    RESTARTING = "restarting"
    GONE = "gone"


class PlacementNumber(Report):
    """The number of a placement; a higher one is newer."""

    term: int
    """The term of the controller that published the placement."""
    epoch: int
    """Counts the placements of that controller."""


class ExpertId(Report):
    """An expert of a layer of a model."""

    model: str
    """The model's name."""
    layer: int
    """The layer's number."""
    expert: int
    """The expert's number in its layer."""

    @property
    def words(self) -> str:
        """The expert for people."""
        return f"expert {self.expert} of layer {self.layer} of {self.model}"


class LayerRouting(Report):
    """How the gates of a layer spread its tokens, in the last assignments that suffice to tell."""

    layer: int
    """The layer's number."""
    experts: int
    """Its experts."""
    entropy: float
    """Entropy of the experts' parts of the assignments, divided by the largest possible one: 1 is
    even, 0 is a single expert."""
    max_over_mean: float
    """Assignments of the busiest expert, divided by their mean over all experts."""
    dead_experts: int
    """Experts without an assignment."""
    busiest_expert: int
    """The number of the busiest expert."""
    collapsed: bool
    """Whether nearly all tokens go to the same few experts, or more than half of them are dead."""

    @property
    def words(self) -> str:
        """The routing for people."""
        return (
            f"layer {self.layer}: entropy {self.entropy:.2f}, max over mean "
            f"{self.max_over_mean:.2f} (expert {self.busiest_expert}), {self.dead_experts} of "
            f"{self.experts} experts dead"
        )


def worst_routing(layers: Collection[LayerRouting]) -> LayerRouting | None:
    """Return the worst of some layers: collapsed ones first, then by entropy; None if none."""
    return min(layers, key=lambda one: (not one.collapsed, one.entropy), default=None)


class Balancedness(Report):
    """How evenly load is spread over the hosts; 1 is even."""

    mean: float
    """Mean over the layers that have load."""
    worst: float
    """Balancedness of the worst layer."""


def balancedness_of(values: list[float]) -> Balancedness | None:
    """Return mean and minimum over layers; None without any layer."""
    if not values:
        return None
    mean, worst = sum(values) / len(values), min(values)
    return Balancedness(mean=round(float(mean), 4), worst=round(float(worst), 4))
