"""A model's chat template: conversations to the text of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..proto.errors import RequestError
from .thinking import Thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, ready for the model; ``thinking`` is None where its template knows none."""

    token_ids: list[int]
    thinking: Thinking | None = None

    def __len__(self) -> int:
        """Its tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    thinking: Thinking | None = None


class ChatTemplate:
    """The chat template of one tokenizer."""

    def __init__(self, model_id: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model_id = model_id
        self._tokenizer = tokenizer

    def check(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises RequestError where the model has no template, or it knows no tools."""
        if not self._tokenizer.chat_template:
            raise RequestError(
                f"the model {self._model_id!r} has no chat template; use /v1/completions",
                param="messages",
            )
        if tools and "tools" not in str(self._tokenizer.chat_template):
            raise RequestError(
                f"the chat template of {self._model_id!r} knows no tools", param="tools"
            )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The prompt's text. ``options`` are further variables of the template
        (``chat_template_kwargs``). Raises RequestError where the template refuses."""
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=True,
                tokenize=False,
                **(options or {}),
            )
        except TemplateError as error:
            # Templates refuse conversations in words of their own (roles must alternate, ...).
            raise RequestError(
                f"the chat template refuses the messages: {error}", param="messages"
            ) from None
        return Rendered(str(text))
