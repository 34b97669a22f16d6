"""Reports on changes of experts' weights."""

from __future__ import annotations

from .report import PlacementNumber, Report


class WeightUpdateReport(Report):
    """An update of experts' weights that is served: what `Cluster.update_expert` returns."""

    model: str
    """The model's name."""
    number: int
    """The update's number, which is the version of the weights that it brought."""
    experts: int
    """Experts that have other weights now."""
    initiator: str
    """Who made it."""
    reverts: int | None
    """The number of the update that it takes back; null if it brought new weights."""
    volatile: bool
    """Whether only hosts have these weights, because the spec gives the model no `updates` folder.
    They are lost with their last host, and with the cluster."""
    placement: PlacementNumber
    """The first placement that names the new versions."""
