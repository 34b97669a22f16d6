"""The controller's items of the page, gathered when the ingress asks: while somebody watches.

Loads, placements and hosts are read every time, and only what has changed leaves the process. What
takes long in a large pool is read once a second.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from ...cluster.expert_keys import LayerKey
from ...cluster.page_feed.items import FeedRevision, ItemChanges, ItemStore
from ...cluster.page_feed.layers import PlacedLayers, even_units, item_name, load_tenths
from ...cluster.reports.placing import ChangeReport
from ...cluster.scaling.scale_events import ScaleEvent
from ..host.report import HostReport
from .overview import Overview

SLOW_S = 1.0
# What one item holds at most; the page shows no more.
_CHANGES, _SCALINGS, _MOVES, _WISHES = 40, 20, 200, 200
_MIB = 1 << 20


class PageItems:
    """Reads an `Overview` into items."""

    def __init__(
        self, overview: Overview, cluster: str, *, unix_clock: Callable[[], float] = time.time
    ) -> None:
        """Nothing is read before `since` is called; ``cluster`` is the cluster's name."""
        self._cluster = cluster
        self._overview = overview
        self._control = overview.control
        # Turns times of the controller's clock into Unix times that stay the same.
        self._epoch_s = unix_clock() - overview.clock()
        self._store = ItemStore(overview.term)
        self._placed = PlacedLayers()
        self._slow_at: float | None = None
        self._moves_for: object = None

    def since(self, known: FeedRevision | None) -> ItemChanges:
        """Read everything, and return what is new since ``known``."""
        now = self._overview.clock()
        self._put_layers()
        self._put_hosts()
        if self._slow_at is None or now - self._slow_at >= SLOW_S:
            self._slow_at = now
            pending = self._put_health(now)
            self._put_models()
            self._put_history(now, pending)
            self._put_moves()
        self._store.commit()
        return self._store.since(known)

    # ---- every time -----------------------------------------------------------------------------

    def _put_layers(self) -> None:
        control, store = self._control, self._store
        placement = control.placement
        placed = {} if placement is None else placement.layers
        store.put_group("place:", self._placed.items(placed, control.view.hosts))
        store.put("names", self._placed.names)
        store.put("placement", None if placement is None else list(placement.id))
        loads = {
            item_name(key): load_tenths(control.loads.rate(key), experts)
            for key, experts in self._layers()
        }
        store.put_group("load:", loads)

    def _layers(self) -> list[tuple[LayerKey, int]]:
        return [
            (LayerKey(name, layer), experts)
            for name, shape in self._control.models.items()
            for layer, experts in shape.experts.items()
        ]

    def _put_hosts(self) -> None:
        overview, control = self._overview, self._control
        lent: dict[str, list[int]] = {}
        for path in itertools.chain.from_iterable(control.paths.values()):
            counts = lent.setdefault(path.host, [0, 0])
            counts[0] += path.lent
            counts[1] += 1
        hosts = {}
        for name, known in control.view.hosts.items():
            report, rates = overview.hosts.reports.get(name), overview.rates.of(name)
            hosts[name] = {
                "state": overview.hosts.state(name).value,
                "error": overview.hosts.errors.get(name) or None,
                "draining": name in control.leaving,
                "slots": known.slots,
                "room_bytes": known.room_bytes,
                "speed": known.speed,
                "lent": lent.get(name, [0, 0]),
                "rates": None
                if rates is None
                else [rates.calls_per_s, rates.rows_per_s, rates.busy_fraction],
                "process": None if report is None else _process(report),
            }
        self._store.put_group("host:", hosts)

    # ---- once a second --------------------------------------------------------------------------

    def _put_health(self, now: float) -> int:
        """Put the pool's health and size; return how many planned replicas are missing."""
        overview, control, store = self._overview, self._control, self._store
        states = [overview.hosts.state(host) for host in control.view.hosts]
        vitals = overview.watchdog.vitals(states, now)
        store.put(
            "health",
            {
                "cluster": self._cluster,
                "term": overview.term,
                "warnings": vitals.warnings(),
                "error": overview.loop.error or None,
                "missing": vitals.missing_experts,
                "unprotected": vitals.unprotected_experts,
                "pending": vitals.moves_pending,
                "automatic": control.policy.auto,
                "mean": _rounded(vitals.balancedness_mean),
                "worst": _rounded(vitals.balancedness_worst),
                "routers": len(control.publisher.routers(now)),
                "obstacles": control.drain_obstacles() if control.leaving else {},
            },
        )
        scaling = overview.sizing.status(now)
        store.put(
            "groups",
            {
                "groups": [group.model_dump(mode="json") for group in scaling.groups],
                "pause": scaling.pause_reason,
                "problem": scaling.problem,
            },
        )
        training = overview.training.status(overview.watchdog.balancedness)
        if training is None:
            store.put("training", None)
        else:
            told = training.model_dump(mode="json", exclude={"age_s"})
            alive = control.training.alive
            store.put("training", told | {"began": None if alive is None else alive.began_at})
        return vitals.moves_pending

    def _put_models(self) -> None:
        control, models = self._control, self._overview.models
        balancedness = self._overview.watchdog.layer_balancedness
        told, even = {}, {}
        for name, shape in control.models.items():
            ref, _ = models[name]
            layers = list(shape.experts)
            told[name] = {
                "layers": layers,
                "experts": list(shape.experts.values()),
                "expert_bytes": shape.expert_bytes,
                "dtype": ref.dtype,
                "replicas": shape.replicas,
                "exact": shape.exact,
                "asleep": name in control.idle_models.asleep,
            }
            even[name] = even_units([LayerKey(name, layer) for layer in layers], balancedness)
        self._store.put_group("model:", told)
        self._store.put_group("even:", even)
        wishes = control.constraints
        self._store.put(
            "wishes",
            {
                "pins": [
                    [*key, sorted(hosts)]
                    for key, hosts in itertools.islice(wishes.pins.items(), _WISHES)
                ],
                "min_replicas": [
                    [*key, count]
                    for key, count in itertools.islice(wishes.min_replicas.items(), _WISHES)
                ],
            },
        )

    def _put_history(self, now: float, pending: int) -> None:
        changes = self._control.changes
        told = [self._change(one.report(now), one.began) for one in changes.earlier] + [
            self._change(one.report(now, pending_moves=pending), one.began) for one in changes.all
        ]
        self._store.put("changes", told[-_CHANGES:])
        scalings = self._overview.sizing.scalings[-_SCALINGS:]
        self._store.put("scalings", [self._scaling(one) for one in scalings])
        self._store.put("events", self._overview.timeline.events)

    def _change(self, report: ChangeReport, began: float) -> dict[str, Any]:
        measured = report.measured
        ended = None if report.duration_s is None else began + report.duration_s
        return report.model_dump(mode="json", exclude={"age_s", "duration_s"}) | {
            "began": self._unix_s(began),
            "ended": self._unix_s(ended),
            "errors": report.errors[:5],
            "measured": None
            if measured is None
            else [measured.balancedness_unchanged.mean, measured.balancedness_changed.mean],
        }

    def _scaling(self, one: ScaleEvent) -> dict[str, Any]:
        return {
            "id": one.id,
            "group": one.group,
            "initiator": one.who,
            "reason": one.why,
            "before": one.before,
            "target": one.count,
            "phase": one.phase.value,
            "awaited": list(one.waits_for),
            "began": self._unix_s(one.began),
            "ended": self._unix_s(one.ended),
        }

    def _put_moves(self) -> None:
        """List the replicas that hosts have yet to load, if anything may have changed."""
        control = self._control
        if control.state == self._moves_for:
            return
        self._moves_for = control.state
        lacking = (
            [*key, host]
            for host in control.view.hosts
            for key in control.loader.lacking(host, control.wanted(host))
        )
        self._store.put("moves", list(itertools.islice(lacking, _MOVES)))

    def _unix_s(self, moment: float | None) -> float | None:
        return None if moment is None else round(self._epoch_s + moment, 1)


def _process(report: HostReport) -> dict[str, Any]:
    return {
        "incarnation": report.entry.incarnation,
        "node": report.entry.node,
        "device": report.device,
        "replicas": sum(map(len, report.holdings.values())),
        "loading": report.loading,
        "weight_bytes": report.weight_bytes,
        "rss_bytes": report.rss_bytes // _MIB * _MIB,
        "machine_bytes": report.machine_bytes[0],
        "queued_rows": report.loop.queued_rows,
        "routers": report.loop.routers,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
