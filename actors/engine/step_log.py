"""Which requests an engine's step had: for the log, at the debug level, and for traces.

A call carries rows of many requests and has the id of its step. So this line leads from a request
to its calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from ...cluster.tracing.layers import StepTrace
from ..tracing.process_tracer import tracer

log = logging.getLogger(__name__)


def log_step(
    router: str, step: int, requests: Callable[[], Iterable[str]], what: str = "requests"
) -> StepTrace | None:
    """Log step ``step`` of ``router``; return its trace, or None if no request of it is sampled.

    ``requests`` returns the engine's keys of the requests, an id and ``#`` and a number. It is
    called only if the line or a trace is wanted.
    """
    here = tracer()
    traces = here is not None and here.computes
    logs = log.isEnabledFor(logging.DEBUG)
    if not (traces or logs):
        return None
    ids = list(dict.fromkeys(key.rpartition("#")[0] or key for key in requests()))
    if logs:
        log.debug(
            "step %d has %d %s",
            step,
            len(ids),
            what,
            extra={"router": router, "step": step, "requests": ids},
        )
    return here.step(router, step, ids) if here is not None and traces else None
