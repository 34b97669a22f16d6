"""Turn texts into vectors, by forward passes of a trunk outside its continuous batch.

They run in the engine's own thread, between two of its steps, so that the model has one user at a
time. Texts that wait form one padded batch. In a causal model a token does not see those after it,
so texts are padded on the right and need no mask.

Shape suffixes: R = texts, T = tokens of the padded batch, H = hidden size.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...cluster.tracing.layers import StepTrace
from ...proto.errors import EngineError, MoesaicError, RequestError, describe_error
from .engine import Pooling
from .sampling import not_finite
from .step_log import log_step

logger = logging.getLogger(__name__)


class _Text:
    def __init__(self, token_ids: Sequence[int], pooling: Pooling, request_id: str) -> None:
        self.request_id = request_id
        self.token_ids = token_ids
        self.pooling = pooling
        self.vector: Future[np.ndarray] = Future()


class Encoder:
    """The texts that wait, and the batch in flight."""

    def __init__(self, model: PreTrainedModel, most_tokens: int) -> None:
        """Create an encoder whose padded batches have at most ``most_tokens``.

        A longer text is a batch of its own.
        """
        self.in_forward = False
        self._model: Any = model
        self._most_tokens = most_tokens
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        # The lock guards these two; only the loop's thread uses the rest.
        self._lock = threading.Lock()
        self._waiting: deque[_Text] = deque()
        self._closed: MoesaicError | None = None
        self._batch: list[_Text] = []
        self._rows_each = 0
        self._faults: dict[int, MoesaicError] = {}

    def submit(
        self, token_ids: Sequence[int], pooling: Pooling, request_id: str = ""
    ) -> Future[np.ndarray]:
        """Queue a text and return a future of its vector, (H,) float32.

        Raises RequestError for a model that has no hidden state of a text.
        """
        if self._model.config.is_encoder_decoder or self._model.base_model is self._model:
            raise RequestError(
                f"{type(self._model).__name__} has no last hidden state of a text, so it gives no "
                "embeddings; use another model",
                param="model",
            )
        text = _Text(token_ids, pooling, request_id)
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._waiting.append(text)
        return text.vector

    @property
    def waits(self) -> bool:
        return bool(self._waiting)

    def close(self, error: MoesaicError) -> None:
        """Give ``error`` to all waiting texts and to later ones."""
        with self._lock:
            self._closed = error
            left, self._waiting = list(self._waiting), deque()
        for text in left:
            if text.vector.set_running_or_notify_cancel():
                text.vector.set_exception(error)

    # ---- the loop's thread ----------------------------------------------------------------------

    def step(self) -> None:
        """Compute one batch of waiting texts, if any wait; their callers get its errors."""
        self._batch = self._take()
        if not self._batch:
            return
        self._faults.clear()
        try:
            hidden_RTH = self._forward()
            for row, text in enumerate(self._batch):
                try:
                    vector_H = self._pooled(row, hidden_RTH[row, : len(text.token_ids)])
                except MoesaicError as error:
                    text.vector.set_exception(error)
                else:
                    text.vector.set_result(vector_H)
        except Exception as error:
            # Any error: the requests of the continuous batch must continue.
            logger.exception("embeddings of %d texts could not be computed", len(self._batch))
            failed = EngineError(f"the engine failed ({describe_error(error)})")
            for text in self._batch:
                if not text.vector.done():
                    text.vector.set_exception(failed)
        finally:
            self._batch = []

    def _take(self) -> list[_Text]:
        taken: list[_Text] = []
        longest = 0
        with self._lock:
            while self._waiting:
                longest = max(longest, len(self._waiting[0].token_ids))
                if taken and longest * (len(taken) + 1) > self._most_tokens:
                    break
                text = self._waiting.popleft()
                if text.vector.set_running_or_notify_cancel():
                    taken.append(text)
        return taken

    def _forward(self) -> Tensor:
        """Return (R, T, H): the hidden states after the last norm."""
        longest = max(len(text.token_ids) for text in self._batch)
        ids_RT = torch.zeros(len(self._batch), longest, dtype=torch.long)
        for row, text in enumerate(self._batch):
            ids_RT[row, : len(text.token_ids)] = torch.tensor(text.token_ids)
        self._rows_each = longest
        found: list[Tensor] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            found.append(output.last_hidden_state)

        more = {"logits_to_keep": 1} if self._keeps else {}
        # The whole model is called, since its hooks tell the router that a step begins.
        hook = self._model.base_model.register_forward_hook(keep)
        self.in_forward = True
        try:
            with torch.no_grad():
                self._model(input_ids=ids_RT.to(self._model.device), use_cache=False, **more)
        finally:
            self.in_forward = False
            hook.remove()
        return found[-1]

    def _pooled(self, row: int, hidden_TH: Tensor) -> np.ndarray:
        """Return the vector of a text, (H,); raise what went wrong with it."""
        if row in self._faults:
            raise self._faults[row]
        pooling = self._batch[row].pooling
        vector_H = hidden_TH[-1] if pooling.kind == "last" else hidden_TH.float().mean(dim=0)
        vector_H = vector_H.float()
        if not bool(vector_H.isfinite().all()):
            raise not_finite("a hidden state")
        if pooling.normalize:
            vector_H = torch.nn.functional.normalize(vector_H, dim=0)
        return vector_H.cpu().numpy()

    # ---- rows of the batch in flight ------------------------------------------------------------

    def fail_rows(self, rows: Sequence[int], error: MoesaicError) -> None:
        """Fail the texts that own ``rows``; see `TransformersEngine.fail_rows`.

        The first error of a text counts.
        """
        for text in self._owners(rows):
            self._faults.setdefault(text, error)

    def log_step(self, router: str, step: int) -> StepTrace | None:
        """Log whose texts are in the forward pass; see `TransformersEngine.log_step`."""
        return log_step(router, step, lambda: [text.request_id for text in self._batch])

    def _owners(self, rows: Sequence[int]) -> Iterator[int]:
        """Yield the texts of those rows that are not padding."""
        for row in rows:
            # Rows count through the padded batch, (R, T): row = text x T + token.
            owner, token = divmod(row, self._rows_each)
            if owner < len(self._batch) and token < len(self._batch[owner].token_ids):
                yield owner
