"""Models that nobody asks for: their experts leave the hosts, and come back with the first call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from ..load.meter import LoadReport
from ..placement import ModelShape


class Sleep:
    """Which models are asleep. One that was put into memory never is: nobody could wake it."""

    def __init__(self) -> None:
        self.asleep: set[str] = set()
        self._asked_at: dict[str, float] = {}

    def hear(self, report: LoadReport, now: float) -> None:
        """Whatever a router counted, or waits for, is asked for."""
        asked = {key.model for key, counts in report.counts.items() if counts.any()}
        for model in asked | {key.model for key in report.unplaced}:
            self._asked_at[model] = now
            self.asleep.discard(model)

    def advance(
        self,
        models: Iterable[ModelShape],
        *,
        on_disk: Collection[str],
        appeared: Callable[[str], bool],
        now: float,
    ) -> None:
        """Models that nobody has asked for long enough fall asleep; not before they were there."""
        for shape in models:
            name = shape.model
            if shape.idle_s is None or name not in on_disk or name in self.asleep:
                continue
            if not appeared(name):
                self._asked_at[name] = now
            elif now - self._asked_at.setdefault(name, now) >= shape.idle_s:
                self.asleep.add(name)

    def awake(self, models: Iterable[ModelShape]) -> list[ModelShape]:
        return [shape for shape in models if shape.model not in self.asleep]
