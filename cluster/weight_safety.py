"""Which served weights are in files, which are only on hosts, and which are lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from .expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion
from .placement import ModelShape, every_expert
from .weight_updates import Holdings


class WeightSafety:
    """Answers from what hosts hold, and from what can be read from files."""

    def __init__(
        self,
        view: Holdings,
        is_on_disk: Callable[[ExpertVersion], bool],
        saved: Collection[ExpertVersion],
    ) -> None:
        """Ask ``view``; ``saved`` has the versions after the first that are in files."""
        self._view = view
        self._is_on_disk = is_on_disk
        self._saved = saved

    def lost(self, weights: Iterable[ExpertVersion]) -> list[ExpertVersion]:
        """Return those of ``weights`` that are in no file and on no host any more."""
        on_disk, holders = self._is_on_disk, self._view.holders
        return [one for one in weights if not on_disk(one) and not holders(*one)]

    def is_lost(self, key: ExpertKey) -> bool:
        """Return whether an expert has weights that it was given later, and these are lost."""
        served = self._view.versions.served(key)
        return served.version != FIRST_VERSION and bool(self.lost([served]))

    def updated(self, shape: ModelShape) -> list[ExpertVersion]:
        """Return what is served of a model's experts that have other weights than at first."""
        served = map(self._view.versions.served, every_expert([shape]))
        return [one for one in served if one.version != FIRST_VERSION]

    def volatile(self, shape: ModelShape) -> list[ExpertVersion]:
        """Return those of the updated ones that no file has."""
        return [one for one in self.updated(shape) if one not in self._saved]
