"""A process's link to its pool: a router that follows the controller's placements."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from ...cluster.expert_keys import LayerKey
from ...cluster.placement import Placement, PlacementNews, VersionChange
from ...kernels.ffn import ExpertForm
from ...proto.errors import describe_error
from ..engine.trunk_config import TrunkConfig
from ..runtime.devices import pick_device, pinned_numa_node
from ..runtime.ray_border import CONTROLLER
from ..store.cluster_secret import secret_of
from .router import Router

log = logging.getLogger(__name__)

# How long the controller may hold its answer to a report while there is no newer placement: of a
# router with load, and of one that has nothing to do (less than `ControlPolicy.lease_s`).
WATCH_S = 1.0
QUIET_WATCH_S = 6.0
_ANSWER_S = 5.0
_END_S = 2.0


class PlacementWatch:
    """A thread that keeps a router and the controller in touch.

    It reports the load that the router counted and the placement that it follows, and hands every
    new placement to the router. It survives restarts of the controller.
    """

    def __init__(self, namespace: str, router: Router) -> None:
        self._namespace = namespace
        self._router = router
        self._newest: Placement | None = None
        self._stop = threading.Event()
        self._answered = threading.Event()  # the report with load is answered, or the thread stops
        self._thread = threading.Thread(target=self._run, name="placement-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._answered.set()
        self._router.stirred.set()
        # It waits for events of Python alone, never inside Ray, so it ends soon.
        self._thread.join(_END_S)

    def _run(self) -> None:
        controller: Any = None
        lost = False  # whether the last report failed
        while not self._stop.is_set():
            try:
                if controller is None:
                    controller = ray.get_actor(CONTROLLER, namespace=self._namespace)
                placement = self._placement(self._report(controller))
            except (RayError, GetTimeoutError, ValueError) as error:
                # The router keeps using its last placement until the controller is back.
                controller = None
                if not self._stop.is_set() and not lost:
                    lost = True
                    log.warning(
                        "router %s: the controller does not answer, so the last placement stays in "
                        "use: %s",
                        self._router.name,
                        describe_error(error).splitlines()[0],
                        extra={"router": self._router.name},
                    )
                self._stop.wait(0.5)
                continue
            if lost:
                lost = False
                log.info("router %s: the controller answers again", self._router.name)
            if placement is not None and not self._stop.is_set():
                self._newest = placement
                self._router.place(placement)

    def _placement(self, news: PlacementNews | None) -> Placement | None:
        """Return the placement that an answer means. Raises ValueError."""
        if isinstance(news, VersionChange) and self._newest is not None:
            return news.applied_to(self._newest)
        # Only to a router that has a placement is a change of it told.
        assert not isinstance(news, VersionChange)
        return news

    def _report(self, controller: Any) -> PlacementNews | None:
        """Report what was counted, and return what is new about placements.

        A router that has nothing to report waits for long. It reports again at once when a call
        begins, and then ignores the answer to the report before.
        """
        stirred = self._router.stirred
        stirred.clear()
        report = self._router.take_load()
        if report.counts or report.unplaced:
            self._answered.clear()
            asked = controller.report.remote(report, WATCH_S)
            asked.future().add_done_callback(lambda _: self._answered.set())
            if not self._stop.is_set():
                self._answered.wait(WATCH_S + _ANSWER_S)
            return None if self._stop.is_set() else ray.get(asked, timeout=0)
        asked = controller.report.remote(report, QUIET_WATCH_S)
        asked.future().add_done_callback(lambda _: stirred.set())
        if not self._stop.is_set():
            stirred.wait(QUIET_WATCH_S + _ANSWER_S)
        if self._stop.is_set() or (stirred.is_set() and not _is_answered(asked)):
            return None
        return ray.get(asked, timeout=0)


def _is_answered(asked: Any) -> bool:
    return bool(ray.wait([asked], timeout=0)[0])


class PoolLink:
    """A router and the `PlacementWatch` that feeds it; `close` ends both."""

    def __init__(
        self,
        config: TrunkConfig,
        layers: Sequence[int],
        device: torch.device | None = None,
        forms: Mapping[int, ExpertForm] | None = None,
    ) -> None:
        """Start the router, and wait until ``layers`` of the model are placed.

        ``device`` is where the trunk's tensors are (None: as ``config`` says). ``forms`` has the
        arithmetic of layers that may be computed here with what hosts lend. Raises ClusterError.
        """
        model = config.model.name
        lent = {LayerKey(model, layer): form for layer, form in (forms or {}).items()}
        self.router = Router(
            name=config.name,
            node=ray.get_runtime_context().get_node_id(),
            policy=config.policy,
            transport=config.transport,
            device=device or pick_device(config.device),
            secret=secret_of(config.namespace),
            numa=pinned_numa_node(),
            forms=(lent or None) if config.lending else None,
        )
        self._watch: PlacementWatch | None = None
        # Before Ray ends with the process, whose handler was registered earlier and so runs later:
        # a thread that asks Ray while it ends would crash the process.
        atexit.register(self.close)
        try:
            self._watch = PlacementWatch(config.namespace, self.router)
            wanted = [LayerKey(model, layer) for layer in layers]
            self.router.wait_ready(config.start_s, wanted)
            log.info(
                "router %s of model %s is ready",
                config.name,
                config.model.name,
                extra={"router": config.name, "model": config.model.name},
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        atexit.unregister(self.close)
        try:
            if self._watch is not None:
                self._watch.close()
        finally:
            self.router.close()
