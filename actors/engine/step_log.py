"""Which requests an engine's step had, at the debug level.

A call carries rows of many requests and has the id of its step. So this line leads from a request
to its calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)


def log_step(
    router: str, step: int, requests: Callable[[], Iterable[str]], what: str = "requests"
) -> None:
    """Log step ``step`` of ``router``.

    ``requests`` returns the engine's keys of the requests, an id and ``#`` and a number. It is
    called only if the line is wanted.
    """
    if not log.isEnabledFor(logging.DEBUG):
        return
    ids = list(dict.fromkeys(key.rpartition("#")[0] or key for key in requests()))
    log.debug(
        "step %d has %d %s",
        step,
        len(ids),
        what,
        extra={"router": router, "step": step, "requests": ids},
    )
