"""The controller's metrics. Ray exports them as `ray_moesaic_...`, once a second."""

from __future__ import annotations

from ray.util.metrics import Gauge

from ...cluster.control.watchdog import Vitals

# Name and description; each name is a field of `Vitals`. Fields that are None are not exported.
_FIGURES = {
    "tick_age_s": "seconds since the controller's last tick",
    "plan_age_s": "seconds since the planner was last asked",
    "planning_s": "seconds that the running plan has taken so far",
    "plan_failures": "plans that failed in a row",
    "move_age_s": "seconds since a planned replica last arrived",
    "moves_pending": "replicas that are planned and not loaded yet",
    "missing_experts": "experts that no host holds",
    "unprotected_experts": "experts that are lost if one failure domain is lost",
    "balancedness_mean": "mean balancedness of the layers (1: hosts are evenly loaded)",
    "balancedness_worst": "balancedness of the worst layer",
    "term": "the controller's term",
    "epoch": "the epoch of the controller's last placement",
    "failing": "1 if the last tick or the last plan ended with an error",
}


class PoolMetrics:
    """The gauges of one cluster, with its name as a tag."""

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
        # Set states without hosts to 0; otherwise their gauges would keep the last value.
        self._states |= vitals.hosts.keys()
        for state in self._states:
            self._hosts.set(vitals.hosts.get(state, 0), tags={"state": state})
