"""What a router logs of its calls, at the debug level: where each part went, and what came back.

Each part has the id ``<router>/<step>/<layer>`` of its layer's call, which the host logs too.
"""

from __future__ import annotations

import logging
from typing import Any

from ...cluster.routing.events import Refused, Send
from ...proto.expert_pb2 import Reply
from ..transport.base import call_id
from .layer_tensors import LayerJob

log = logging.getLogger(__name__)


class CallLog:
    """The lines about one router's calls; ask `on` before each, so that they cost nothing."""

    def __init__(self, router: str) -> None:
        self._router = router

    @property
    def on(self) -> bool:
        return log.isEnabledFor(logging.DEBUG)

    def sent(self, job: LayerJob, send: Send, *, hedge: bool) -> None:
        log.debug(
            "sent to %s",
            send.host,
            extra=self._ids(job, send.host)
            | {
                "seq": send.seq,
                "rows": send.choice_tk.shape[0],
                "attempt": send.attempt,
                "hedge": hedge,
            },
        )

    def answered(self, job: LayerJob, send: Send, reply: Reply) -> None:
        log.debug(
            "%s has answered",
            send.host,
            extra=self._ids(job, send.host)
            | {
                "seq": send.seq,
                "queued_ms": reply.queued_us / 1e3,
                "batch_ms": reply.batch_us / 1e3,
            },
        )

    def refused(self, job: LayerJob, refused: Refused) -> None:
        log.debug(
            "%s has refused: %s: %s",
            refused.host,
            refused.code,
            refused.message,
            extra=self._ids(job, refused.host) | {"seq": refused.seq, "code": refused.code},
        )

    def slow(self, job: LayerJob, took_s: float) -> None:
        log.warning(
            "layer %d of %s took %.1f s: hosts were late, or had to load experts",
            job.key.layer,
            job.key.model,
            took_s,
            extra=self._ids(job, None),
        )

    def _ids(self, job: LayerJob, host: str | None) -> dict[str, Any]:
        model, layer = job.key
        return {
            "call_id": call_id(self._router, job.step, layer),
            "router": self._router,
            "step": job.step,
            "model": model,
            "layer": layer,
            "host": host,
        }
