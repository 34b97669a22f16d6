"""What a host keeps of forward calls until their backward halves come.

The loop's thread alone uses it.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from ....kernels.backward.kept import KeptCall
from ....proto.expert_pb2 import Call

log = logging.getLogger(__name__)


class _Computation(NamedTuple):
    """What activations follow from: versions of a layer's experts, rows, and who computes which.

    Calls that have all of this in common have the same activations, bit for bit. Rows and ids are
    named by a digest of 128 bits (XXH3).
    """

    model: str
    layer: int
    version: int
    other_versions: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    shape: tuple[int, ...]  # (T, H, K)
    digest: bytes

    @classmethod
    def of(cls, call: Call, x_TH: Tensor, ids_TK: Tensor) -> _Computation:
        digest = xxhash.xxh3_128()
        for tensor in (x_TH, ids_TK):
            digest.update(tensor.view(torch.uint8).numpy().data)
        return cls(
            call.model,
            call.layer,
            call.version,
            tuple((other.expert, other.version) for other in call.other_versions),
            x_TH.dtype,
            (*x_TH.shape, ids_TK.shape[1]),
            digest.digest(),
        )


class KeptActivations:
    """The activations of one attempt's forward calls, as many as a limit allows.

    They are taken once. What is over the limit goes, the oldest first, because a trunk comes back
    to its last layer first. Who finds nothing computes it again.
    """

    def __init__(self) -> None:
        self.limit_bytes = 0  # 0: no attempt is under way, and nothing is kept
        self.nbytes = 0
        # Of this attempt: calls whose activations were found, were not, and were over the limit.
        self.taken = self.missed = self.dropped = 0
        self._calls: dict[_Computation, KeptCall] = {}  # the oldest first

    def begin(self, limit_bytes: int) -> None:
        """Begin an attempt, and forget what was kept before."""
        self.end()
        self.limit_bytes = limit_bytes
        self.taken = self.missed = self.dropped = 0

    def end(self) -> None:
        """Forget everything, and keep nothing until another attempt begins."""
        if self.limit_bytes:
            log.log(
                logging.INFO if self.dropped else logging.DEBUG,
                "activations of %d calls were kept for their backward halves; %d were computed "
                "again, and %d were dropped, because all may take %d bytes",
                self.taken,
                self.missed,
                self.dropped,
                self.limit_bytes,
            )
        self._calls.clear()
        self.limit_bytes = self.nbytes = 0

    def keep(self, call: Call, x_TH: Tensor, ids_TK: Tensor, kept: KeptCall) -> None:
        """Keep what a forward call has computed of its rows, in place of what it has before."""
        name = _Computation.of(call, x_TH, ids_TK)
        self._remove(name)
        self._calls[name] = kept
        self.nbytes += kept.nbytes
        while self.nbytes > self.limit_bytes:
            self._remove(next(iter(self._calls)))
            self.dropped += 1

    def take(self, call: Call, x_TH: Tensor, ids_TK: Tensor) -> KeptCall | None:
        """Return what was kept of the same computation, which is the caller's now."""
        found = self._remove(_Computation.of(call, x_TH, ids_TK)) if self._calls else None
        if found is None:
            self.missed += 1
        else:
            self.taken += 1
        return found

    def _remove(self, name: _Computation) -> KeptCall | None:
        found = self._calls.pop(name, None)
        if found is not None:
            self.nbytes -= found.nbytes
        return found
