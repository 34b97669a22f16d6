"""How a model's thinking is told from its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thinking:
    """The marks of a chat template whose model thinks before it answers.

    ``opened``: the prompt ends inside of the thinking, so the answer begins with it and holds no
    ``begin``.
    """

    begin: str = "<think>"
    end: str = "</think>"
    opened: bool = False
