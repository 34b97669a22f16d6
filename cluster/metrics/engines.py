"""The metrics of trunks' engines, from what these report at a scrape."""

from __future__ import annotations

from collections.abc import Mapping

from ..reports.status import EngineStatus
from .families import Families


def engine_families(engines: Mapping[str, EngineStatus]) -> Families:
    """Return the metrics of each model's engine."""
    found = Families()
    for model, engine in engines.items():
        found.add("engine_healthy", engine.healthy, model=model)
        work = engine.work
        if work is not None:
            found.add("engine_running_requests", work.running_requests, model=model)
            found.add("engine_waiting_requests", work.waiting_requests, model=model)
            found.add("engine_parked_requests", work.parked_requests, model=model)
            found.add("engine_steps_total", work.steps, model=model)
            found.add("engine_restarts_total", work.restarts, model=model)
            found.add("engine_beat_age_seconds", work.beat_age_s, model=model)
            found.add("engine_free_cache_ratio", work.free_cache_fraction, model=model)
    return found
