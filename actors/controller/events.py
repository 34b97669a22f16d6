"""The controller's log of what happens to the pool, at the info level.

It compares the state machine before and after each tick. So the state machines know nothing of
logs, and what an operator asks for between two ticks is logged with the next one.
"""

from __future__ import annotations

import logging

from ...cluster.control.changes import Change
from ...cluster.control.control import Control
from ...cluster.placement import PlacementId
from ...cluster.reports.placing import ChangePhase
from ...cluster.reports.scaling import ScalingPhase
from ...cluster.scaling.fleet import Fleet
from ...cluster.scaling.scale_events import ScaleEvent

log = logging.getLogger(__name__)


class Events:
    """What was last seen of one pool; `tick` logs what is new."""

    def __init__(self, control: Control, fleet: Fleet) -> None:
        """Begin with the state that there is, which is not logged."""
        self._control = control
        self._fleet = fleet
        self._change_phases: dict[int, ChangePhase] = {}
        self._scaling_phases: dict[int, ScalingPhase] = {}
        self._asleep = control.idle_models.asleep
        self._leaving: dict[str, bool] = {}  # whether it was seen to be empty
        self._number: PlacementId | None = None
        self._run = control.training.alive

    def tick(self) -> None:
        """Log what has changed since the last call."""
        for scaling in self._fleet.scalings.all:
            if self._scaling_phases.get(scaling.id) is not scaling.phase:
                _log_scaling(scaling, new=scaling.id not in self._scaling_phases)
        self._scaling_phases = {scaling.id: scaling.phase for scaling in self._fleet.scalings.all}
        self._log_leaving()
        self._log_sleep()
        self._log_training()
        for change in self._control.changes.all:
            if self._change_phases.get(change.id) is not change.phase:
                _log_change(change, new=change.id not in self._change_phases)
        self._change_phases = {change.id: change.phase for change in self._control.changes.all}
        self._log_placement()

    def _log_placement(self) -> None:
        placement = self._control.placement
        if placement is None or placement.id == self._number:
            return
        self._number = placement.id
        log.info(
            "placement %d.%d is published",
            *placement.id,
            extra={"hosts": sorted(placement.hosts), "layers": len(placement.layers)},
        )

    def _log_sleep(self) -> None:
        asleep = self._control.idle_models.asleep
        for model in sorted(asleep - self._asleep):
            log.info("model %s falls asleep: it had no request", model, extra={"model": model})
        for model in sorted(self._asleep - asleep):
            log.info("model %s wakes up", model, extra={"model": model})
        self._asleep = asleep

    def _log_training(self) -> None:
        training = self._control.training
        before, self._run = self._run, training.alive
        if before is self._run:
            return
        if before is not None:
            level = logging.WARNING if training.expired else logging.INFO
            ids = {"model": before.model, "run": before.run, "initiator": before.who}
            log.log(level, "%s has ended: %s", before, training.ending, extra=ids)
        if self._run is not None:
            ids = {"model": self._run.model, "run": self._run.run, "initiator": self._run.who}
            log.info("%s begins", self._run, extra=ids)

    def _log_leaving(self) -> None:
        view = self._control.view
        now = {
            host: host in view.observations and view.empty(host) for host in self._control.leaving
        }
        for host, empty in sorted(now.items()):
            if host not in self._leaving:
                log.info("host %s is being drained", host, extra={"host": host})
            if empty and not self._leaving.get(host):
                log.info("host %s is drained", host, extra={"host": host})
        for host in sorted(self._leaving.keys() - now.keys()):
            what = "is used again" if host in view.hosts else "has left the pool"
            log.info("host %s %s", host, what, extra={"host": host})
        self._leaving = now


def _log_change(change: Change, *, new: bool) -> None:
    ids = {
        "change": change.id,
        "initiator": change.who,
        "reason": change.why,
        "phase": change.phase.value,
    }
    if new:
        log.info("change %d begins: %d replicas move", change.id, len(change.plan.moves), extra=ids)
    if change.phase is ChangePhase.FAILED:
        log.warning("change %d has failed: %s", change.id, "; ".join(change.errors), extra=ids)
    elif change.phase is not ChangePhase.LOADING:
        log.info("change %d ends: %s", change.id, change.phase.value, extra=ids)


def _log_scaling(scaling: ScaleEvent, *, new: bool) -> None:
    ids = {
        "scaling": scaling.id,
        "group": scaling.group,
        "initiator": scaling.who,
        "reason": scaling.why,
        "phase": scaling.phase.value,
    }
    if new:
        log.info(
            "group %d goes from %d to %d hosts",
            scaling.group,
            scaling.before,
            scaling.count,
            extra=ids | {"coming": scaling.coming, "leaving": scaling.leaving},
        )
    if scaling.phase is ScalingPhase.NO_ROOM:
        waits_for = ", ".join(scaling.waits_for)
        log.warning("scaling %d has no room now: it waits for %s", scaling.id, waits_for, extra=ids)
    elif scaling.phase in (ScalingPhase.DONE, ScalingPhase.SUPERSEDED):
        log.info("scaling %d ends: %s", scaling.id, scaling.phase.value, extra=ids)
