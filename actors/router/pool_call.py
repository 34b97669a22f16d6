"""A layer's call that was sent to the hosts, and waits for its answers.

Shape suffixes: T = tokens, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...cluster.routing.events import Send
from ...cluster.routing.expert_fallback import BatchExpertOptions
from ...cluster.routing.layer_call import LayerCall
from ...proto.errors import ClusterError
from .layer_tensors import LayerTensors
from .lent_experts import LentPart


@dataclass(slots=True)
class RunningCall:
    """A call whose result was not taken yet, as the router knows it."""

    state: LayerCall | None  # None: nothing was sent
    tensors: LayerTensors
    options: BatchExpertOptions | None
    began: float
    lent: LentPart | None = None  # what the router computes itself
    error: Exception | None = None  # why it has no result

    @property
    def done(self) -> bool:
        """Whether nothing is left to compute here, nor to wait for."""
        if self.error is not None:
            return True
        computed = self.lent is None or self.lent.out is not None
        return computed and (self.state is None or self.state.outcome is not None)


class Combines(Protocol):
    """A router, for its calls."""

    def compute(self, call: RunningCall, x_TH: Tensor) -> RunningCall: ...

    def combine(self, call: RunningCall, x_TH: Tensor) -> Tensor: ...

    def cancel(self, call: RunningCall) -> None: ...


class PoolCall:
    """One layer's call, which was sent to the hosts; see `Router.dispatch`."""

    def __init__(self, router: Combines, call: RunningCall | None, x_TH: Tensor) -> None:
        """Wrap a call; None: it has no tokens, and its result is that of ``x_TH``."""
        self._router = router
        self._call = call
        self._x_TH = x_TH
        self._ended = False

    @property
    def kept(self) -> Sequence[Send]:
        """The parts, in a call with ``keep``, whose hosts have answered and may have kept them."""
        return () if self._call is None else self._call.tensors.kept

    @property
    def done(self) -> bool:
        """Whether `combine` would not wait."""
        return self._ended or self._call is None or self._call.done

    @torch.no_grad()
    def compute(self) -> None:
        """Compute what hosts have lent of this call, unless that is done; an error ends it."""
        if self._ended or self._call is None:
            return
        try:
            self._call = self._router.compute(self._call, self._x_TH)
        except BaseException:
            self._ended = True
            raise

    @torch.no_grad()
    def combine(self) -> Tensor:
        """Wait for the call's result, (T, H) in the dtype and on the device of its hidden states.

        If no replica of an expert answered in time, raises ExpertUnavailable with the expert's
        name; if `batch.on_lost` is set, the affected rows are zero instead. Raises ClusterError if
        the router was closed or interrupted meanwhile, and if the call has ended already.
        """
        if self._ended:
            raise ClusterError("the result of this call was taken already, or it was cancelled")
        self.compute()
        self._ended = True
        if self._call is None:
            return self._x_TH.clone()
        return self._router.combine(self._call, self._x_TH)

    def cancel(self) -> None:
        """End the call without a result, if it has not ended."""
        if not self._ended and self._call is not None:
            self._router.cancel(self._call)
        self._ended = True
