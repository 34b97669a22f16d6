"""What a router logs of its calls, at the debug level: where each part went, and what came back.

Each part has the id ``<router>/<step>/<layer>`` of its layer's call, which the host logs too.
"""

from __future__ import annotations

import logging
from typing import Any

from ...cluster.routing.events import Refused, Send
from ...proto.expert_pb2 import Reply
from ..transport.base import call_id
from .layer_tensors import LayerTensors

log = logging.getLogger(__name__)


class CallLog:
    """The lines about one router's calls; ask `on` before each, so that they cost nothing."""

    def __init__(self, router: str) -> None:
        self._router = router

    @property
    def on(self) -> bool:
        return log.isEnabledFor(logging.DEBUG)

    def sent(self, tensors: LayerTensors, send: Send, *, hedge: bool) -> None:
        log.debug(
            "sent to %s",
            send.host,
            extra=self._ids(tensors, send.host)
            | {
                "seq": send.seq,
                "rows": send.assignment_tk.shape[0],
                "attempt": send.attempt,
                "hedge": hedge,
            },
        )

    def answered(self, tensors: LayerTensors, send: Send, reply: Reply) -> None:
        log.debug(
            "%s has answered",
            send.host,
            extra=self._ids(tensors, send.host)
            | {
                "seq": send.seq,
                "queued_ms": reply.queued_us / 1e3,
                "batch_ms": reply.batch_us / 1e3,
            },
        )

    def refused(self, tensors: LayerTensors, refused: Refused) -> None:
        log.debug(
            "%s has refused: %s: %s",
            refused.host,
            refused.code,
            refused.message,
            extra=self._ids(tensors, refused.host) | {"seq": refused.seq, "code": refused.code},
        )

    def slow(self, tensors: LayerTensors, took_s: float) -> None:
        log.warning(
            "layer %d of %s took %.1f s: hosts were late, or had to load experts",
            tensors.key.layer,
            tensors.key.model,
            took_s,
            extra=self._ids(tensors, None),
        )

    def _ids(self, tensors: LayerTensors, host: str | None) -> dict[str, Any]:
        model, layer = tensors.key
        return {
            "call_id": call_id(self._router, tensors.step, layer),
            "router": self._router,
            "step": tensors.step,
            "model": model,
            "layer": layer,
            "host": host,
            "trace_ids": None if tensors.trace is None else tensors.trace.shown,
        }
