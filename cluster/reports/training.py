"""The report on a run of `moesaic train`."""

from __future__ import annotations

from .report import Report


class TrainReport(Report):
    """What a run of `moesaic train` has come to."""

    model: str
    """The model that was trained."""
    steps: int
    """Steps that are done."""
    wanted_steps: int
    """Steps of the whole run; fewer are done after Ctrl-C, and `--resume` goes on."""
    loss: float | None
    """Mean loss of the last step's tokens, in nats; null before the first step."""
    first_perplexity: float | None
    """Perplexity of the held-out sequences before the first step; null without evaluation."""
    perplexity: float | None
    """The same, as it was measured last."""
    tokens_per_s: float | None
    """Tokens of a second, over all steps."""
    folder: str
    """The folder of the run."""
    checkpoint: str | None
    """The newest checkpoint: a folder that transformers, vLLM and `moesaic up` can open."""
    collapsed: str | None = None
    """Which layers' gates have collapsed, and what helps; null if none have."""
