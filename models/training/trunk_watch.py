"""Whether a trunk's parameters are those that the last step has left."""

from __future__ import annotations

from collections.abc import Container

from torch import nn


class TrunkWatch:
    """Remembers a model's parameters and how often each was changed.

    Owners keep masters of them, which the next step would put in the place of what others wrote.
    ``apart`` are ids of parameters that are not looked at.
    """

    def __init__(self, model: nn.Module, apart: Container[int]) -> None:
        self._model = model
        self._apart = apart
        self._seen: dict[str, tuple[nn.Parameter, int]] = {}
        self.record()

    def record(self) -> None:
        """Take the parameters as they are."""
        self._seen = self._now()

    def changed(self) -> list[str]:
        """Return the names of parameters that were changed in place or replaced."""
        now = self._now()
        return [
            name
            for name in self._seen.keys() | now.keys()
            if name not in now
            or name not in self._seen
            or now[name][0] is not self._seen[name][0]
            or now[name][1] != self._seen[name][1]
        ]

    def _now(self) -> dict[str, tuple[nn.Parameter, int]]:
        return {
            name: (one, one._version)
            for name, one in self._model.named_parameters()
            if id(one) not in self._apart
        }
