"""The controller's face for whoever watches: status and totals, as plain values."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from ..cluster.control import Control
from ..cluster.placement import ModelShape
from ..cluster.recording import LoadTotals
from .host import HostReport
from .store import ModelRef


class Overview:
    """What `Controller` inherits for `status`, `top` and recordings."""

    _control: Control
    _errors: dict[str, str]
    _hosts: tuple[str, ...]
    _last_tick: float
    _models: dict[str, tuple[ModelRef, ModelShape]]
    _plan_error: str
    _reports: dict[str, HostReport]
    _states: dict[str, str]
    _term: int
    _tick_error: str
    _ticks: int

    async def status(self) -> dict[str, Any]:
        """Plain values for people and JSON."""
        placement = self._control.placement
        missing = self._control.missing()
        return {
            "placement": list(placement.number) if placement else None,
            "tick_age_s": round(time.monotonic() - self._last_tick, 3),
            "ticks": self._ticks,
            "error": self._tick_error or self._plan_error,
            "term": self._term,
            "routers": {
                name: None if number is None else list(number)
                for name, number in self._control.publisher.routers(time.monotonic()).items()
            },
            "balance": self._balance_status(),
            "hosts": [self._host_status(host) for host in self._hosts],
            "models": [
                {
                    "name": name,
                    "path": ref.path,
                    "dtype": ref.dtype,
                    "replicas": shape.replicas,
                    "exact": shape.exact,
                    "layers": len(shape.experts),
                    "experts": sum(shape.experts.values()),
                    "missing_experts": sum(1 for key in missing if key.model == name),
                }
                for name, (ref, shape) in self._models.items()
            ],
            "missing_experts": [f"{key}: {why}" for key, why in list(missing.items())[:10]],
            "unprotected_experts": len(self._control.unprotected()),
        }

    async def totals(self) -> LoadTotals:
        """All counts since this controller's start."""
        loads = self._control.loads
        return LoadTotals(term=self._term, counts=loads.totals, hosts=loads.hosts)

    # ---- parts ----------------------------------------------------------------------------------

    def _balance_status(self) -> dict[str, Any]:
        now = time.monotonic()
        control = self._control
        last = control.changes.all[-1] if control.changes.all else None
        return {
            "auto": control.policy.auto,
            "plan_age_s": None
            if control.planned_at is None
            else round(now - control.planned_at, 1),
            "moves_pending": control.pending(),
            "leaving": sorted(control.wishes.leaving),
            "last_change": None if last is None else last.describe(now),
        }

    def _host_status(self, host: str) -> dict[str, Any]:
        status: dict[str, Any] = {"host": host, "state": self._states[host]}
        report = self._reports.get(host)
        if report is not None:
            status |= {
                "incarnation": report.entry.incarnation,
                "node": report.entry.node,
                "pid": report.pid,
                "device": report.device,
                "experts": sum(map(len, report.holdings.values())),
                "loading": report.loading,
                "weight_bytes": report.weight_bytes,
                "rss_bytes": report.rss_bytes,
                **asdict(report.loop),
            }
        if host in self._errors:
            status["error"] = self._errors[host]
        return status
