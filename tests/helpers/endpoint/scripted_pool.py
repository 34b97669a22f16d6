"""A pool of any size that is made up, for the page: skewed loads, replicas, hosts, a history.

It answers as a controller does (`page_app.PageSource`), and carries actions out on paper.

Shapes: L layers, E experts, T topics, H hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel

from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.page_feed.items import FeedRevision, ItemChanges, ItemStore
from moesaic.cluster.page_feed.layers import PlacedLayers, even_units, item_name, load_tenths
from moesaic.cluster.placement import LayerPlacement, Replica
from moesaic.cluster.planner.balance import balancedness
from moesaic.cluster.reports.placing import (
    ChangePhase,
    ChangeReport,
    LayerPlan,
    MoveKind,
    PlannedMove,
    PlanReport,
)
from moesaic.cluster.reports.report import Balancedness
from moesaic.proto.errors import ClusterError

KEY = "the-operators-key"
MODEL = "kimi-k2"
GIB = 1 << 30
TOPICS = 6


class ScriptedPool:
    """L x E experts on H hosts; `advance` lets time go by."""

    def __init__(
        self,
        layers: int = 61,
        experts: int = 384,
        hosts: int = 32,
        *,
        model: str = MODEL,
        rows_per_s: float = 9000.0,
        top_k: int = 8,
        seed: int = 5,
        began: float = 1_795_000_000.0,
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.model, self.hosts = model, [f"host-{i}" for i in range(hosts)]
        self.keys = [LayerKey(model, layer) for layer in range(layers)]
        self.experts, self.rows_per_s, self.top_k = experts, rows_per_s, top_k
        self.now = self.began = began
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.fails: Exception | None = None
        self.changes: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.moves: list[list[Any]] = []
        self.training: dict[str, Any] | None = None
        self.drained: set[str] = set()
        self.pins: dict[tuple[str, int, int], set[str]] = {}
        self.lost: set[str] = set()
        self._taste_LTE = self._tastes(layers, experts)
        self.load_LE = self._load()
        self.layers = {
            key: self._placed(self.load_LE[i] * self.random.lognormal(0, 0.12, experts))
            for i, key in enumerate(self.keys)
        }
        self._store, self._encoder = ItemStore(term=7), PlacedLayers()
        self._put()

    # ---- the page's source ----------------------------------------------------------------------

    async def items(self, known: FeedRevision | None) -> ItemChanges:
        if self.fails is not None:
            raise self.fails
        self._put()
        return self._store.since(known)

    async def operator_key(self) -> str:
        return KEY

    async def act(self, method: str, arguments: tuple[Any, ...]) -> BaseModel:
        self.asked.append((method, arguments))
        if self.fails is not None:
            raise self.fails
        if method == "plan":
            return self.plan()
        if method in ("drain", "undrain"):
            return self._drain(method, *arguments)
        if method in ("pin", "unpin"):
            return self._pin(method, *arguments)
        return self.begin(f"{method} as asked", "page", 12)

    # ---- what happens ---------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Let the load drift."""
        self.now += seconds
        self.load_LE = self._load()

    def begin(
        self, why: str, who: str, moves: int, *, ended_s: float | None = None
    ) -> ChangeReport:
        """Begin a change that moves hot experts."""
        number = len(self.changes) + 1
        mean = self.even().mean()
        change = ChangeReport(
            id=number,
            initiator=who,
            reason=why,
            phase=ChangePhase.LOADING if ended_s is None else ChangePhase.DONE,
            age_s=0.0,
            duration_s=ended_s,
            total_moves=moves,
            pending_moves=0 if ended_s is not None else int(moves * 0.6),
            weight_bytes=moves * 44 << 20,
            balancedness_before=Balancedness(mean=round(mean - 0.1, 3), worst=0.51),
            balancedness_predicted=Balancedness(mean=round(mean, 3), worst=0.83),
            errors=[],
            measured=None,
        )
        told = change.model_dump(mode="json", exclude={"age_s", "duration_s"})
        ended = None if ended_s is None else self.now + ended_s
        measured = None if ended is None else [round(mean - 0.1, 3), round(mean - 0.01, 3)]
        self.changes.append(told | {"began": self.now, "ended": ended, "measured": measured})
        if ended is None:
            self.moves = self._hot_moves(int(moves * 0.6))
        return change

    def happen(self, what: str, level: str = "plain", host: str | None = None) -> None:
        event: dict[str, Any] = {"at": self.now, "what": what, "level": level}
        self.events.append(event if host is None else event | {"host": host})

    def plan(self) -> PlanReport:
        even = self.even()
        return PlanReport(
            moves=[
                PlannedMove(
                    model=self.model,
                    layer=layer,
                    expert=expert,
                    host=host,
                    kind=MoveKind.BALANCE,
                    reason=f"takes load off {self.hosts[(layer * 7) % len(self.hosts)]}",
                    weight_bytes=44 << 20,
                    replaces=[],
                )
                for _, layer, expert, host in self._hot_moves(24)
            ],
            drops=[],
            weight_bytes=24 * 44 << 20,
            expected_s=21.5,
            balancedness_before=Balancedness(mean=even.mean(), worst=even.min()),
            balancedness_after=Balancedness(mean=0.981, worst=0.94),
            layers=[
                LayerPlan(
                    model=self.model,
                    layer=key.layer,
                    balancedness_before=float(even[i]),
                    balancedness_after=0.98,
                )
                for i, key in enumerate(self.keys)
            ],
            unprotected_experts_before=self._single(),
            unprotected_experts_after=self._single(),
            unplaced_experts=[],
            lacking_bytes=0,
        )

    def even(self) -> np.ndarray:
        """Return (L,) balancedness of each layer."""
        speed_H = np.ones(len(self.hosts))
        return np.array([balancedness(load_H, speed_H) for load_H in self.host_load()])

    def host_load(self) -> np.ndarray:
        """Return (L, H) assignments a second."""
        index = {host: i for i, host in enumerate(self.hosts)}
        load_LH = np.zeros((len(self.keys), len(self.hosts)))
        for i, key in enumerate(self.keys):
            for load, replicas in zip(self.load_LE[i], self.layers[key].replicas, strict=True):
                for host, share in replicas:
                    load_LH[i, index[host]] += load * share
        return load_LH

    # ---- making it up ---------------------------------------------------------------------------

    def _tastes(self, layers: int, experts: int) -> np.ndarray:
        """Each topic likes some experts of each layer, a few of them very much."""
        base_LE = self.random.lognormal(0, 0.45, (layers, experts))
        topic_LTE = self.random.lognormal(0, 1.0, (layers, TOPICS, experts))
        # Some experts stay hot over neighbouring layers, and the first layers are more skewed.
        for i in range(1, layers):
            topic_LTE[i] = 0.45 * topic_LTE[i - 1] + 0.55 * topic_LTE[i]
        skew_L = 1.0 + 0.3 * np.exp(-np.arange(layers) / 6) + 0.18 * np.cos(np.arange(layers) / 9)
        return (base_LE[:, None] * topic_LTE) ** skew_L[:, None, None]

    def _load(self) -> np.ndarray:
        phase = (self.now - self.began) / 45.0
        weight_T = 1.0 + 0.8 * np.sin(phase + np.arange(TOPICS) * 2.1)
        mixed_LE = np.einsum("lte,t->le", self._taste_LTE, weight_T)
        noise_LE = self.random.lognormal(0, 0.05, mixed_LE.shape)
        part_LE = mixed_LE * noise_LE
        part_LE /= part_LE.sum(axis=1, keepdims=True)
        return part_LE * self.rows_per_s * self.top_k

    def _placed(self, load_E: np.ndarray) -> LayerPlacement:
        """Give the hottest experts more replicas, and each replica to the idlest host."""
        copies_E = np.ones(self.experts, dtype=int)
        most = max(1, min(8, len(self.hosts)))
        for _ in range(self.experts // 3):
            ratio_E = np.where(copies_E < most, load_E / copies_E, 0)
            copies_E[int(np.argmax(ratio_E))] += 1
        load_H = np.zeros(len(self.hosts))
        held_H = np.zeros(len(self.hosts))
        found: list[tuple[Replica, ...]] = [()] * self.experts
        for expert in np.argsort(-load_E / copies_E).tolist():
            count = int(copies_E[expert])
            chosen = np.argsort(load_H + 1e-6 * held_H, kind="stable")[:count].tolist()
            load_H[chosen] += load_E[expert] / count
            held_H[chosen] += 1
            found[expert] = tuple(Replica(self.hosts[h], 1 / count) for h in chosen)
        return LayerPlacement(tuple(found))

    def _hot_moves(self, count: int) -> list[list[Any]]:
        hot = np.argsort(-self.load_LE, axis=None)[: 40 * count : 40]
        places = [divmod(int(cell), self.experts) for cell in hot]
        return [
            [self.model, layer, expert, self.hosts[(layer * 5 + expert) % len(self.hosts)]]
            for layer, expert in places
        ]

    def _single(self) -> int:
        return sum(len(r) == 1 for layer in self.layers.values() for r in layer.replicas)

    def _drain(self, method: str, host: str, who: str) -> ChangeReport:
        if host not in self.hosts:
            raise ClusterError(f"host: {host!r} is not a host of this cluster")
        (self.drained.add if method == "drain" else self.drained.discard)(host)
        return self.begin(f"{method} {host}", who, 40)

    def _pin(self, method: str, key: tuple[str, int, int], host: str, who: str) -> ChangeReport:
        pins = self.pins.setdefault(key, set())
        (pins.add if method == "pin" else pins.discard)(host)
        return self.begin(f"{method} expert {key[2]} of layer {key[1]}", who, 1)

    # ---- items ----------------------------------------------------------------------------------

    def _put(self) -> None:
        store = self._store
        placed = self._encoder.items(self.layers, self.hosts)
        store.put_group("place:", placed)
        store.put("names", self._encoder.names)
        loads = {
            item_name(key): load_tenths(self.load_LE[i], self.experts)
            for i, key in enumerate(self.keys)
        }
        store.put_group("load:", loads)
        load_LH = self.host_load()
        even = {
            key: balancedness(load_LH[i], np.ones(len(self.hosts)))
            for i, key in enumerate(self.keys)
        }
        mean = float(np.mean(list(even.values())))
        store.put_group("even:", {self.model: even_units(self.keys, even)})
        store.put_group("model:", {self.model: self._model()})
        store.put_group("host:", self._hosts(load_LH.sum(axis=0)))
        store.put("health", self._health(mean, min(even.values())))
        store.put(
            "groups",
            {
                "groups": [
                    {
                        "hosts": len(self.hosts),
                        "min_hosts": 8,
                        "max_hosts": 64,
                        "cost_per_hour": 4.0,
                    }
                ],
                "pause": None,
                "problem": None,
            },
        )
        store.put("training", self.training)
        pins = [[*key, sorted(hosts)] for key, hosts in self.pins.items() if hosts]
        store.put("wishes", {"pins": pins, "min_replicas": []})
        store.put("changes", list(self.changes))
        store.put("scalings", [])
        store.put("events", list(self.events))
        store.put("moves", list(self.moves))
        store.commit()

    def _model(self) -> Mapping[str, Any]:
        return {
            "layers": [key.layer for key in self.keys],
            "experts": [self.experts] * len(self.keys),
            "expert_bytes": 44 << 20,
            "dtype": "float8_e4m3fn",
            "replicas": 1,
            "exact": False,
            "asleep": False,
        }

    def _hosts(self, load_H: np.ndarray) -> Mapping[str, Any]:
        replicas = dict.fromkeys(self.hosts, 0)
        for layer in self.layers.values():
            for held in layer.replicas:
                for replica in held:
                    replicas[replica.host] += 1
        busy_H = 0.74 * load_H / load_H.mean()
        return {
            host: {
                "state": "restarting" if host in self.lost else "up",
                "error": None,
                "draining": host in self.drained,
                "slots": None,
                "room_bytes": 72 * GIB,
                "speed": 1.0,
                "lent": [2 if i % 4 == 0 else 0, 8],
                "rates": [
                    round(float(load_H[i]) / 60, 1),
                    round(float(load_H[i]) / 3, 1),
                    round(min(1.0, float(busy_H[i])), 4),
                ],
                "process": None
                if host in self.lost
                else {
                    "incarnation": 1,
                    "node": f"node-{i // 8}",
                    "device": "cuda",
                    "replicas": replicas[host],
                    "loading": 0,
                    "weight_bytes": replicas[host] * (44 << 20),
                    "rss_bytes": 2 * GIB,
                    "machine_bytes": 2048 * GIB,
                    "queued_rows": int(40 * busy_H[i] ** 4),
                    "routers": 8,
                },
            }
            for i, host in enumerate(self.hosts)
        }

    def _health(self, mean: float, worst: float) -> Mapping[str, Any]:
        return {
            "cluster": "prod",
            "term": 7,
            "warnings": [],
            "error": None,
            "missing": 0,
            "unprotected": self._single(),
            "pending": len(self.moves),
            "automatic": True,
            "mean": round(mean, 4),
            "worst": round(worst, 4),
            "routers": 8,
            "obstacles": dict.fromkeys(self.drained, "draining"),
        }
