"""Records of a run as TensorBoard shows them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ....cluster.train_command.records import HeldOutRecord, Record, ReturnRecord

_OF_STEPS = (
    *("loss", "lr", "grad_norm", "balance_loss"),
    *("entropy", "max_over_mean", "dead_experts", "workers", "attempts"),
)


class Events:
    """Writes events of TensorBoard into a folder; without the package it writes nothing."""

    def __init__(self, folder: Path) -> None:
        self._writer: Any = None
        try:
            # It imports tensorboard, which is optional.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder), flush_secs=10)

    @property
    def writes(self) -> bool:
        return self._writer is not None

    def add(self, record: Record, balancedness: float | None = None) -> None:
        """Add all numbers of a record; ``balancedness`` is that of the hosts."""
        if self._writer is None:
            return
        if isinstance(record, ReturnRecord):
            return
        if isinstance(record, HeldOutRecord):
            self._writer.add_scalar("held_out/loss", record.held_out_loss, record.step)
            self._writer.add_scalar("held_out/perplexity", record.perplexity, record.step)
            return
        values = {name: getattr(record, name) for name in _OF_STEPS}
        values["tokens_per_s"] = record.tokens / record.seconds if record.seconds else None
        values["balancedness"] = balancedness
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"train/{name}", value, record.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
