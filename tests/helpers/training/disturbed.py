"""Answers to backward calls that are lost, damaged or late."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from moesaic.actors.transport.shm import ShmSession
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.proto.expert_pb2 import Frame

HASTY = RouterPolicy(deadline_s=20.0, attempt_s=0.1, probe_s=0.05, retry_burst=100)


class Disturbed:
    """Answers to backward calls that are lost, damaged or late, at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._send = ShmSession.send_reply

    def send_reply(self, session: ShmSession, frame: Frame, buffer: Tensor) -> None:
        (kind,) = self._random.choices(["lost", "damaged", "late", "sent"], [20, 5, 5, 70])
        self.counts[kind] += 1
        if kind == "late":
            time.sleep(1.5 * HASTY.attempt_s)
        if kind == "damaged":
            buffer[0] ^= 1
        if kind != "lost":
            self._send(session, frame, buffer)

    @contextmanager
    def backward(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
        """Disturb what hosts answer inside the block; other patches may be added there."""
        with monkeypatch.context() as patch:
            patch.setattr(
                ShmSession,
                "send_reply",
                lambda session, frame, buffer: self.send_reply(session, frame, buffer),
            )
            yield patch
