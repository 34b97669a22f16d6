"""The backward half of a layer's call: what it sends and receives beyond a forward call.

Shape suffixes: T = tokens, H = hidden size, N = T * K assignments flattened, t, k = rows and
columns of one send.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...cluster.routing.events import Send
from ...cluster.training.contributions import Attempt
from ...proto.expert_pb2 import Frame
from ...proto.wire import CallLayout
from ..runtime.devices import to_cpu


class BackwardHalf:
    """The gradient of a call's result, and those of its weights as they arrive."""

    def __init__(
        self,
        attempt: Attempt,
        worker: int,
        microbatch: int,
        grad_y_TH: Tensor,
        weights: int,
        *,
        first_part: int,
        forward: Sequence[Send] = (),
    ) -> None:
        """Take what the call's parts are named by, and the gradient of its result.

        ``weights`` is the number of its assignments. Parts are numbered from ``first_part``, and no
        other call of the layer and the worker's microbatch has these numbers. ``forward`` has the
        parts of the forward call whose hosts may have kept activations.
        """
        self.forward = forward
        self._attempt = attempt
        self._worker = worker
        self._microbatch = microbatch
        self._first_part = first_part
        self._grad_TH = grad_y_TH.detach().contiguous()
        self._grad_weights_N = torch.zeros(weights, dtype=grad_y_TH.dtype)

    def announce(self, frame: Frame, send: Send) -> None:
        """Make ``frame`` one of a backward call."""
        backward = frame.backward
        backward.run, backward.step, backward.attempt = self._attempt
        backward.worker = self._worker
        backward.microbatch = self._microbatch
        backward.part = self._first_part + send.part

    def write(self, send: Send, layout: CallLayout, buffer: Tensor) -> None:
        """Write the rows of the gradient that ``send`` needs."""
        grad_TH = self._on_cpu if buffer.device.type == "cpu" else self._grad_TH
        token_t = torch.from_numpy(send.token_t).to(grad_TH.device)
        layout.grad_tensor(buffer).copy_(grad_TH.index_select(0, token_t))

    @functools.cached_property
    def _on_cpu(self) -> Tensor:
        """All rows at once: a send for each host would wait for the device each time."""
        return to_cpu(self._grad_TH)

    def accept(self, send: Send, layout: CallLayout, payload: Tensor) -> None:
        """Take the gradients of the weights out of the answer to ``send``."""
        used = torch.from_numpy(np.flatnonzero(send.assignment_tk >= 0))
        found_tk = layout.grad_weights_tensor(payload).cpu()
        self._grad_weights_N[torch.from_numpy(send.assignments)] = found_tk.view(-1)[used]

    def grad_weights(self, like_TK: Tensor) -> Tensor:
        """Return the gradients of all weights, in the shape and dtype of ``like_TK``."""
        return self._grad_weights_N.view(like_TK.shape).to(like_TK)
