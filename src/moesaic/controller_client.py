"""Asking a cluster's controller, and waiting until what it began has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .proto.errors import ClusterError

if TYPE_CHECKING:
    from .cluster.reports.placing import ChangeReport, DrainReport
    from .cluster.reports.scaling import ScalingReport

# A plan for a large pool takes most of it.
OPERATION_S = 120.0
# Seconds between two looks at an operation in progress.
LOOK_S = 0.2


class _Progress(Protocol):
    """A report on something that is under way, or has ended."""

    @property
    def under_way(self) -> bool: ...


R = TypeVar("R", bound=_Progress)


class ControllerClient:
    """Calls the controller's methods by their names. Raises ClusterError."""

    def __init__(self, join: Callable[[], str]) -> None:
        """Create a client; ``join`` connects to the cluster's Ray, and returns the namespace."""
        self._join = join

    def ask(self, method: str, *arguments: Any, timeout_s: float = OPERATION_S) -> Any:
        # `Any`, because Ray has no types for the methods of actors.
        from .actors.runtime.ray_border import controller_of, ray_get

        controller = controller_of(self._join())
        return ray_get(getattr(controller, method).remote(*arguments), timeout_s, method)

    def change(
        self, number: int, timeout_s: float, watch: Callable[[ChangeReport], None] | None
    ) -> ChangeReport:
        """Wait until a change has ended."""

        def late(seen: ChangeReport) -> str:
            return (
                f"change {number}: {seen.pending_moves} replicas are still to come after "
                f"{timeout_s:g} s; the cluster goes on with the change: see `moesaic history`"
            )

        return _until(lambda: self.ask("change", number), late, timeout_s, watch)

    def scaling(
        self, number: int, timeout_s: float, watch: Callable[[ScalingReport], None] | None
    ) -> ScalingReport:
        """Wait until a scaling has ended."""

        def late(seen: ScalingReport) -> str:
            return (
                f"scaling {number}: it has not ended after {timeout_s:g} s ({seen.phase.words}), "
                f"and waits for {', '.join(seen.awaited_hosts)}; the cluster goes on with the "
                "scaling: see `moesaic status`, or give a larger timeout"
            )

        return _until(lambda: self.ask("scaling", number), late, timeout_s, watch)

    def drain(
        self, host: str, timeout_s: float, watch: Callable[[DrainReport], None] | None
    ) -> DrainReport:
        """Wait until a host is empty, or its drain finds no room, or the time is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            seen: DrainReport = self.ask("draining", host)
            if not seen.under_way or time.monotonic() >= deadline:
                return seen
            if watch is not None:
                watch(seen)
            time.sleep(LOOK_S)


def _until(
    look: Callable[[], R],
    late: Callable[[R], str],
    timeout_s: float,
    watch: Callable[[R], None] | None,
) -> R:
    """Look until what is seen has ended. Raises ClusterError with the message of ``late``."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if not seen.under_way:
            return seen
        if watch is not None:
            watch(seen)
        if time.monotonic() >= deadline:
            raise ClusterError(late(seen))
        time.sleep(LOOK_S)
