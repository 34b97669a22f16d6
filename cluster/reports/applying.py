"""Reports on a running cluster that follows another spec."""

from __future__ import annotations

from .report import Report


class SpecDifference(Report):
    """One key of the spec that differs."""

    path: str
    """The key's path in the spec, with a model's name or a host group's place in it."""
    before: str | None
    """The value with which the cluster runs, as JSON; null if the key is new."""
    after: str | None
    """The value in the new spec, as JSON; null if the key is gone."""


class ApplyReport(Report):
    """What a new spec changes in a running cluster."""

    cluster: str
    """The cluster's name."""
    differences: list[SpecDifference]
    """All keys that differ, in the order of the spec."""
    restarts: list[str]
    """The parts that have to start anew for that, in words; all others go on."""
    applied: bool
    """Whether the cluster follows the new spec by now."""
