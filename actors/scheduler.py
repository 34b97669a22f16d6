"""Which requests transformers' continuous batching takes next; part of the seam (`batching.py`)."""

from __future__ import annotations

from collections.abc import Callable

from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)

SCHEDULER = "moesaic"


class RankScheduler(FIFOScheduler):
    """The waiting requests by their rank.

    transformers admits no new request after an eviction until one *finishes*. When the running
    ones are cancelled instead, that never happens and the waiting ones starve.
    """

    rank: Callable[[str], tuple[int, int]]  # of a request; the smaller, the sooner

    def _get_waiting_candidates(self) -> list[RequestState]:
        return sorted(super()._get_waiting_candidates(), key=lambda one: self.rank(one.request_id))

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled


SCHEDULER_MAPPING[SCHEDULER] = RankScheduler
