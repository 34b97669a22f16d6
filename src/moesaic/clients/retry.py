"""Retries: whether and when a call that failed is made again."""

from __future__ import annotations

import random

from ..proto.errors import Busy, Expired, MoesaicError

RETRIES = 2
# The pause before a retry is drawn from 0 to _PAUSE_S, which doubles with each retry.
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0


class Retries:
    """The retries of one call.

    Only errors that may not occur on another try are retried. Pauses have jitter, so that clients
    that failed together do not return together.
    """

    def __init__(self, retries: int) -> None:
        self._left = retries
        self._made = 0

    def pause_s(self, error: MoesaicError) -> float:
        """Return the pause before the next try. Raises ``error`` if there is none.

        Calls that took too long are not retried.
        """
        if not error.retryable or isinstance(error, Expired) or self._left <= 0:
            raise error
        self._left -= 1
        most_s = min(_PAUSE_S * 2**self._made, _LONGEST_PAUSE_S)
        self._made += 1
        asked_s = error.retry_after_s or 0.0 if isinstance(error, Busy) else 0.0
        return asked_s + random.uniform(0, most_s)
