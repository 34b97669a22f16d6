"""The versions of weights that a forward pass uses: the same ones from its first layer to its last.

A placement that arrives while a pass is running is followed at once, because it may name the hosts
that take over from dead ones. Only layers whose experts' versions change in it stay as they were
until the pass ends. Until then the router reports the number of the placement before, so that no
host evicts the older versions.
"""

from __future__ import annotations

from dataclasses import replace

from ..placement import Placement


class StepVersions:
    """The newest placement, and how many forward passes are running, one inside the other."""

    def __init__(self) -> None:
        self._steps = 0
        # The newest placement, if it changes versions and waits for the running pass to end.
        self._coming: Placement | None = None

    def newest(self, followed: Placement | None) -> Placement | None:
        return self._coming or followed

    def take(
        self, newer: Placement, followed: Placement | None, *, calls: bool
    ) -> Placement | None:
        """Return what to follow from now on, or None if ``newer`` is not newer.

        ``calls``: calls are in progress.
        """
        newest = self.newest(followed)
        if newest is not None and newer.id <= newest.id:
            return None
        self._coming = None
        if followed is None or not (self._steps or calls):
            return newer
        found = until_step_ends(followed, newer)
        self._coming = None if found is newer else newer
        return found

    def due(self, *, calls: bool) -> Placement | None:
        """Return the newest placement, unless it is followed, or a pass or a call is running."""
        if self._steps or calls:
            return None
        newest, self._coming = self._coming, None
        return newest

    def begin(self) -> None:
        self._steps += 1

    def end(self) -> None:
        self._steps = max(0, self._steps - 1)


def until_step_ends(followed: Placement, newer: Placement) -> Placement:
    """Return what to follow while a forward pass runs that began under ``followed``.

    It is ``newer`` itself if that changes no version of the layers in ``followed``.
    """
    changed = {
        key
        for key in followed.layers.keys() & newer.layers.keys()
        if followed.versions.layer(key) != newer.versions.layer(key)
    }
    if not changed:
        return newer
    layers = {
        key: followed.layers[key] if key in changed else layer
        for key, layer in newer.layers.items()
        if key in followed.layers
    }
    return replace(newer, id=followed.id, layers=layers, versions=followed.versions)
