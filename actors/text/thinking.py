"""How a model's thinking is told from its answer."""

from __future__ import annotations

from dataclasses import dataclass

# What models write around their thinking: Qwen, DeepSeek, GLM and most others; Command A;
# Mistral's Magistral; Seed-OSS; Kimi-VL.
_MARKS = (
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
)


@dataclass(frozen=True, slots=True)
class Thinking:
    """The marks of a chat template whose model thinks before it answers.

    ``opened``: the prompt ends inside of the thinking, so the answer begins with it and holds no
    ``begin``.
    """

    begin: str = "<think>"
    end: str = "</think>"
    opened: bool = False

    @classmethod
    def of(cls, template: str) -> Thinking | None:
        """The marks that a template's text names; None where it names none that are known."""
        # DeepSeek's first template strips thinking, and does not open it.
        for begin, end in _MARKS:
            if end in template:
                return cls(begin, end)
        return None
