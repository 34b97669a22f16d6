"""An operator's work with a running pool: watching, planning, moving experts, scaling."""

from __future__ import annotations

import getpass
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Any

from .proto.errors import ClusterError

if TYPE_CHECKING:
    from .actors.serve.launch import Progress
    from .cluster.load.trace import Trace

# A plan for a large pool takes most of it.
OPERATION_S = 120.0
# Seconds between two looks at an operation in progress.
LOOK_S = 0.2


def quiet(step: str, done: int, total: int) -> None:
    """Show no progress."""


class Operating(ABC):
    """The operators' methods, which `Cluster` inherits."""

    @abstractmethod
    def _join(self) -> str:
        """Connect this process to the cluster's Ray, and return the namespace."""

    def top(self, experts: int = 10) -> dict[str, Any]:
        """Return the current activity as plain values.

        Hosts, the hottest ``experts``, balancedness, and moves to come. Rates are means over the
        last seconds. Raises ClusterError.
        """
        return self._ask("top", experts)

    def experts(
        self, model: str | None = None, layer: int | None = None, *, hot: int | None = None
    ) -> list[dict[str, Any]]:
        """Return every expert, or those of one model or layer, as plain values.

        Each has ``replicas`` with their hosts and shares, ``choices_per_s`` over 10, 60 and 600
        seconds, ``layer_part`` (its part of its layer's choices, None without any), and the
        operators' ``least_replicas`` and ``pinned_to``. With ``hot`` only so many, the hottest
        first. Raises ClusterError.
        """
        return self._ask("experts", model, layer, hot)

    def record(
        self,
        seconds: float,
        window_s: float = 1.0,
        *,
        stop: Event | None = None,
        progress: Progress | None = None,
    ) -> Trace:
        """Record the load of the next ``seconds``, window by window; `write_trace` saves it.

        The recording ends early when ``stop`` is set. Raises RequestError and ClusterError.
        """
        from .actors.runtime.ray_border import ask, controller_of
        from .traces import record

        namespace = self._join()
        return record(
            lambda: ask(controller_of(namespace).totals.remote(), 10.0, "the load so far"),
            seconds,
            window_s,
            stop=stop or Event(),
            progress=progress or quiet,
        )

    def plan(self, *, budget: int | str | None = None) -> dict[str, Any]:
        """Return what `rebalance` would do now, as plain values.

        Moves with reasons, bytes, seconds, and balancedness and protection before and after.
        ``budget`` is the most replicas to load for balance, or the most bytes ("4GB"; default: as
        in the spec). Raises ClusterError.
        """
        return self._ask("plan", budget)

    def rebalance(self, *, budget: int | str | None = None) -> dict[str, Any]:
        """Start the best plan for the current load, and return the change.

        `change` shows its progress. Raises ClusterError.
        """
        return self._ask("rebalance", budget, getpass.getuser())

    def change(self, number: int | None = None) -> dict[str, Any]:
        """Return one change of the placement, or the last one, with its phase and pending moves.

        Raises ClusterError.
        """
        return self._ask("change", number)

    def history(self) -> list[dict[str, Any]]:
        """Return the last changes: who, why, moves, predicted and measured effect, and phase."""
        return self._ask("history")

    def rollback(self, number: int | None = None) -> dict[str, Any]:
        """Return to the placement before a change (default: the last). Raises ClusterError."""
        return self._ask("rollback", number)

    def replicate(self, model: str, layer: int, expert: int, count: int) -> dict[str, Any]:
        """Keep at least ``count`` replicas of an expert from now on; 1 cancels that.

        Returns the change, whose ``errors`` say what has no room. Raises ClusterError.
        """
        return self._ask("replicate", (model, layer, expert), count, getpass.getuser())

    def pin(self, model: str, layer: int, expert: int, host: str) -> dict[str, Any]:
        """Keep a replica of an expert on ``host``; return the change. Raises ClusterError."""
        return self._ask("pin", (model, layer, expert), host, getpass.getuser())

    def unpin(self, model: str, layer: int, expert: int, host: str) -> dict[str, Any]:
        """Cancel a `pin`; return the change. Raises ClusterError."""
        return self._ask("unpin", (model, layer, expert), host, getpass.getuser())

    def drain(self, host: str, timeout_s: float = 0.0) -> int:
        """Move all experts off ``host`` while requests go on; `undrain` cancels it.

        Returns how many are left after ``timeout_s``, or as soon as the other hosts have no room
        for them (`draining` says so). Raises ClusterError.
        """
        self._ask("drain", host, getpass.getuser())
        deadline = time.monotonic() + timeout_s
        while True:
            drain = self.draining(host)
            if drain["phase"] != "draining" or time.monotonic() >= deadline:
                return drain["experts"]
            time.sleep(LOOK_S)

    def draining(self, host: str) -> dict[str, Any]:
        """Return the progress of a drain: the number of ``experts`` left, and a ``phase``.

        The phase is "draining", "done", or "no room", with what is ``lacking``; the drain goes on
        when there is room. Raises ClusterError.
        """
        return self._ask("draining", host)

    def undrain(self, host: str) -> dict[str, Any]:
        """Let a drained host hold experts again; return the change. Raises ClusterError."""
        return self._ask("undrain", host, getpass.getuser())

    def wait_for(
        self,
        change: dict[str, Any],
        timeout_s: float = 600.0,
        *,
        watch: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Wait until a change has ended, and return it; its ``phase`` says how it ended.

        ``watch`` is called repeatedly with the change as it is then. Raises ClusterError.
        """
        return _until(
            lambda: self.change(change["id"]),
            ended=lambda seen: seen["phase"] != "loading",
            late=lambda seen: (
                f"change {change['id']}: {seen['pending']} replicas are still to come after "
                f"{timeout_s:g} s; it goes on, `moesaic history` shows it"
            ),
            timeout_s=timeout_s,
            watch=watch,
        )

    def scale(
        self,
        count: int,
        group: int = 0,
        *,
        timeout_s: float = 600.0,
        watch: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Set the number of hosts of a group, and wait until it is reached while requests go on.

        ``watch`` is called repeatedly with the scaling as it is then. Returns how it ended: the
        hosts that came and left, and a ``phase``, which is "no room" if hosts wait for machines.
        The same call again continues the waiting. Raises ClusterError.
        """
        number = self._ask("scale", count, group, getpass.getuser())["id"]
        return _until(
            lambda: self._ask("scaling", number),
            ended=lambda seen: not seen["under_way"],
            late=lambda seen: (
                f"scaling {number}: {seen['phase']}, waits for {', '.join(seen['waits_for'])} "
                f"after {timeout_s:g} s; it goes on"
            ),
            timeout_s=timeout_s,
            watch=watch,
        )

    def _ask(self, method: str, *arguments: Any) -> Any:
        from .actors.runtime.ray_border import ask, controller_of

        controller = controller_of(self._join())
        return ask(getattr(controller, method).remote(*arguments), OPERATION_S, method)


def _until(
    look: Callable[[], dict[str, Any]],
    *,
    ended: Callable[[dict[str, Any]], bool],
    late: Callable[[dict[str, Any]], str],
    timeout_s: float,
    watch: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """Look until what is seen has ended. Raises ClusterError with the message of ``late``."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if ended(seen):
            return seen
        if watch is not None:
            watch(seen)
        if time.monotonic() >= deadline:
            raise ClusterError(late(seen))
        time.sleep(LOOK_S)
