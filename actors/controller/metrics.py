"""The controller's metrics, as Ray exports them: `ray_moesaic_...`, once a second."""

from __future__ import annotations

from ray.util.metrics import Gauge

from ...cluster.control.watchdog import Vitals

# Name, and what it says; each is a field of `Vitals`. What has no value yet is not exported.
_FIGURES = {
    "tick_age_s": "seconds since the controller's last tick",
    "plan_age_s": "seconds since the planner was last asked",
    "planning_s": "seconds that the planner has been at work",
    "plan_failures": "plans that failed, in a row",
    "move_age_s": "seconds since a planned replica last arrived",
    "moves_pending": "replicas that are planned and not there yet",
    "missing_experts": "experts that no host holds",
    "unprotected_experts": "experts that the loss of one failure domain takes away",
    "balancedness_mean": "mean over layers of load / speed of all hosts, by that of the busiest",
    "balancedness_worst": "the same of the worst layer",
    "term": "the controller's term",
    "epoch": "the epoch of its last placement",
    "failing": "1 if the last tick or the last plan ended with an error",
}


class PoolMetrics:
    """Gauges with the cluster's name as a tag."""

    def __init__(self, cluster: str) -> None:
        tags = {"cluster": cluster}
        self._gauges = {
            name: Gauge(f"moesaic_{name}", words, tag_keys=("cluster",))
            for name, words in _FIGURES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags(tags)
        self._hosts = Gauge("moesaic_hosts", "hosts by state", tag_keys=("cluster", "state"))
        self._hosts.set_default_tags(tags)
        self._states: set[str] = set()

    def set(self, vitals: Vitals) -> None:
        for name, gauge in self._gauges.items():
            value = getattr(vitals, name)
            if value is not None:
                gauge.set(float(value))
        # A state that nobody is in any more would stay as it was.
        self._states |= vitals.hosts.keys()
        for state in self._states:
            self._hosts.set(vitals.hosts.get(state, 0), tags={"state": state})
