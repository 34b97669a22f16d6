"""A simulated controller's part in the pool's size: the shell of `actors/sizing.py`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..control import Control
from ..fleet import Fleet
from .facts import Sized

if TYPE_CHECKING:
    from .controller import SimController


class Sizing:
    """The real `Fleet` and autoscaler of one controller, and what it keeps for its successor."""

    def __init__(self, controller: SimController) -> None:
        settings, registry = controller.world.settings, controller.world.registry
        self.fleet = Fleet(
            settings.groups,
            settings.scale,
            pending_s=settings.pending_s,
            kept=json.loads(registry.fleet) if registry.fleet else None,
        )
        self._controller = controller
        self._kept_version = -1

    def scale(self, control: Control, group: int, count: int) -> None:
        """An operator's. Raises ValueError."""
        now = self._controller.clock.now
        self.fleet.scale(control, group, count, who="operator", now=now)
        self._keep()

    def tick(self, control: Control, now: float) -> None:
        """Behind every tick of the controller."""
        before = self.fleet.desired().keys()
        self.fleet.tick(control, now)
        self._keep()
        registry = self._controller.world.registry
        for name in before - self.fleet.desired().keys():
            registry.wishes = control.wishes
            registry.let_go[name] = self._controller.asked_at

    def _keep(self) -> None:
        if self.fleet.version != self._kept_version:
            self._kept_version = self.fleet.version
            self._controller.world.registry.fleet = json.dumps(self.fleet.keep())
            self._controller.world.tell(Sized(self._controller))
