"""The marks that separate a model's thinking from its answer."""

from __future__ import annotations

from dataclasses import dataclass

# Marks around thinking, in this order: Qwen, DeepSeek, GLM and most others; Command A; Mistral's
# Magistral; Seed-OSS; Kimi-VL.
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

    ``opened``: the prompt ends within thinking, so the answer begins with it and has no
    ``begin``.
    """

    begin: str = "<think>"
    end: str = "</think>"
    opened: bool = False

    @classmethod
    def of(cls, template: str) -> Thinking | None:
        """Return the marks that a template's text has; None where it has no known ones."""
        # Only `end` is looked for: DeepSeek's first template strips thinking, but does not open it.
        for begin, end in _MARKS:
            if end in template:
                return cls(begin, end)
        return None
