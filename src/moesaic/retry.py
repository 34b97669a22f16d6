"""Whether a call that failed is made again."""

from __future__ import annotations

import random

from .proto.errors import Busy, Expired, MoesaicError

RETRIES = 2
# The pause before another try is drawn from 0 to this, doubled with each.
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0


class Tries:
    """Whether a call that failed is made again, and after which pause: only what may succeed when
    it is sent again, and with jitter, so that those who failed together do not come back so."""

    def __init__(self, retries: int) -> None:
        self._left = retries
        self._made = 0

    def pause_s(self, error: MoesaicError) -> float:
        """Raises ``error`` when there is no other try. What took too long is not begun again."""
        if not error.retryable or isinstance(error, Expired) or self._left <= 0:
            raise error
        self._left -= 1
        most_s = min(_PAUSE_S * 2**self._made, _LONGEST_PAUSE_S)
        self._made += 1
        asked_s = error.retry_after_s or 0.0 if isinstance(error, Busy) else 0.0
        return asked_s + random.uniform(0, most_s)
