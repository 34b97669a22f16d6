"""Idle models: their experts leave the hosts, and come back with the next call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from ..load.meter import LoadReport
from ..placement import ModelShape


class IdleModels:
    """Tracks which models are asleep.

    A model never sleeps while some of its weights are in no file: no host could load them again.
    """

    def __init__(self) -> None:
        self._asleep: set[str] = set()
        self._asked_at: dict[str, float] = {}

    @property
    def asleep(self) -> frozenset[str]:
        """The models that are asleep."""
        return frozenset(self._asleep)

    def keep_asleep(self, models: Iterable[str]) -> None:
        """Let models sleep that did so under the controller before this one."""
        self._asleep.update(models)

    def forget(self, model: str) -> None:
        """Forget a model that is not served any more."""
        self._asleep.discard(model)
        self._asked_at.pop(model, None)

    def hear(self, report: LoadReport, now: float) -> None:
        """Wake the models for which a router has counted load or waits for experts."""
        asked = {key.model for key, counts in report.counts.items() if counts.any()}
        for model in asked | {key.model for key in report.unplaced}:
            self.wake(model, now)

    def wake(self, model: str, now: float) -> None:
        """Wake a model, or let it stay awake, because somebody needs its experts."""
        self._asked_at[model] = now
        self._asleep.discard(model)

    def advance(
        self,
        models: Iterable[ModelShape],
        *,
        saved: Collection[str],
        appeared: Callable[[str], bool],
        now: float,
    ) -> None:
        """Let models sleep that had no call for ``idle_s``, counted from their first placement.

        ``saved`` are those of which all weights are in files.
        """
        for shape in models:
            name = shape.model
            if shape.idle_s is None or name not in saved or name in self._asleep:
                continue
            if not appeared(name):
                self._asked_at[name] = now
            elif now - self._asked_at.setdefault(name, now) >= shape.idle_s:
                self._asleep.add(name)

    def awake(self, models: Iterable[ModelShape]) -> list[ModelShape]:
        """Return the models that are not asleep."""
        return [shape for shape in models if shape.model not in self._asleep]
