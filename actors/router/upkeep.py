"""A router's own thread: connections make progress between calls while somebody expects experts.

The thread of a call handles what arrives while the call runs. When no call runs, for example
because all requests wait for a missing expert, this thread connects to hosts and hears of them.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ...cluster.expert_keys import ExpertKey, LayerKey

log = logging.getLogger(__name__)

# Pause between two looks at the connections.
LOOK_S = 0.02


class Upkeep:
    """Looks after connections for as long as anybody is inside `expecting`."""

    def __init__(self, router: str, look: Callable[[Sequence[LayerKey]], None]) -> None:
        """Start nothing yet; ``look`` handles what arrived, and gets the layers expected."""
        self._router = router
        self._look = look
        self._expected: Counter[LayerKey] = Counter()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None  # from the first expectation on

    @contextmanager
    def expecting(self, experts: Sequence[ExpertKey]) -> Iterator[None]:
        """Let the thread look for these experts while the block runs; this hardly blocks."""
        layers = Counter({LayerKey(key.model, key.layer) for key in experts})
        with self._changed:
            self._expected += layers
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(
                    target=self._run, name=f"{self._router}-upkeep", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._expected -= layers

    def close(self, timeout_s: float = 1.0) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._expected)
                if self._closed:
                    return
                layers = sorted(self._expected)
            try:
                self._look(layers)
            except Exception:
                # Whatever it is, those who wait must still hear of experts that come back.
                log.exception("router %s: the upkeep of its connections failed once", self._router)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, LOOK_S)
