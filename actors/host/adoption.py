"""What a host takes over of the memory that its predecessor, a killed process, has left."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...cluster.expert_keys import ExpertVersion
from ...cluster.host.residency import LayerShape
from ...cluster.placement import ModelRef, ModelShape
from ...kernels.slabs import memfd
from ...kernels.slabs.layout import SlabLayout
from ...proto.errors import describe_error
from .memory.kept_memory import LeftMemory
from .report import PlacedModel
from .weight_store import ExpertStore

log = logging.getLogger(__name__)

_END_S = 10.0


def model_as_json(placed: PlacedModel) -> dict[str, Any]:
    """Return a model in JSON's types; empty if it would not be the same when it is read again."""
    ref, shape = placed
    try:
        found = json.loads(json.dumps({"ref": asdict(ref), "shape": asdict(shape)}))
        return found if model_from_json(found) == placed else {}
    except (TypeError, ValueError):
        return {}


def model_from_json(given: Mapping[str, Any]) -> PlacedModel:
    """Return the model. Raises ValueError."""
    try:
        experts = {int(layer): count for layer, count in given["shape"]["experts"].items()}
        return ModelRef(**given["ref"]), ModelShape(**{**given["shape"], "experts": experts})
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it does not say which model it is of: {error!r}") from error


class Adoption:
    """The experts that a host has from its predecessor, and the check of their checksums."""

    def __init__(self, host: str, store: ExpertStore) -> None:
        self.models: list[PlacedModel] = []
        self.held: dict[ExpertVersion, LayerShape] = {}
        self._host = host
        self._store = store
        self._stopping = False
        self._thread: threading.Thread | None = None

    def take(self, left: Sequence[LeftMemory]) -> list[str]:
        """Adopt the memory of each model, and return the models where that failed.

        Their memory is unmapped here, and the host loads their experts again.
        """
        began, declined = time.monotonic(), []
        for memory in left:
            model = memory.model
            try:
                self._adopt(memory)
            except Exception as error:
                # Whatever it is: what only saves time must not keep the host from starting.
                declined.append(model)
                level = logging.WARNING if isinstance(error, ValueError) else logging.ERROR
                log.log(
                    level,
                    "host %s: what its predecessor has left of %s cannot be used, and is loaded "
                    "again: %s",
                    self._host,
                    model,
                    describe_error(error),
                    extra={"host": self._host, "model": model},
                )
            finally:
                memory.close()
        if self.held:
            took_s = time.monotonic() - began
            log.info(
                "host %s has taken over %d experts of its predecessor in %.2f s",
                self._host,
                len(self.held),
                took_s,
                extra={"host": self._host},
            )
        return declined

    def _adopt(self, left: LeftMemory) -> None:
        with memfd.adopt(left.descriptor) as memory, memoryview(memory) as header:
            about = SlabLayout.read(header).about
        placed = model_from_json(about)
        self.held.update(self._store.adopt(placed[0], about, left))
        self.models.append(placed)

    def check(self, drop: Callable[[ExpertVersion], None]) -> None:
        """Compare all checksums on a thread, and ``drop`` the experts whose bytes have changed."""
        if self.held:
            self._thread = threading.Thread(
                target=self._check, args=(drop,), name=f"{self._host}-check", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """End the check, which looks at one more expert at most."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join(_END_S)

    def _check(self, drop: Callable[[ExpertVersion], None]) -> None:
        for one in self.held:
            if self._stopping:
                return
            try:
                if not self._store.is_sound(one):
                    log.error(
                        "host %s: the bytes of %s have changed since they were loaded; it is "
                        "loaded again",
                        self._host,
                        one,
                        extra={"host": self._host},
                    )
                    drop(one)
            except Exception:
                # Whatever it is, the others are still to be checked.
                log.exception("host %s: %s could not be checked", self._host, one)
