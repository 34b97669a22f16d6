"""Render one Jinja template of a tokenizer as transformers does; failures are RequestErrors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from ...proto.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

# More than any model's context holds. What a template writes is searched and encoded.
MAX_CHARS = 2**26


class TemplateSource:
    """The text of a template, and the function that renders conversations with it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.text = text
        self._tokenizer = tokenizer

    def render(
        self, messages: Messages, tools: Messages = (), options: Mapping[str, Any] | None = None
    ) -> str:
        """Return the prompt's text. Raises RequestError for whatever the template does.

        A template is a program that came with the model; a conversation that it cannot
        render is refused.
        """
        try:
            text = self._render(messages, tools, options or {})
        except Exception as error:
            # A template may raise anything.
            raise RequestError(_why(error), param="messages") from error
        if len(text) > MAX_CHARS:
            raise RequestError(
                f"the chat template writes {len(text)} characters for these messages; at most "
                f"{MAX_CHARS} are allowed",
                param="messages",
            )
        return text

    def attempt(
        self, messages: Messages, tools: Messages = (), options: Mapping[str, Any] | None = None
    ) -> str | None:
        """Return the prompt's text, or None where the template fails."""
        try:
            return self.render(messages, tools, options)
        except RequestError:
            return None

    def _render(self, messages: Messages, tools: Messages, options: Mapping[str, Any]) -> str:
        from transformers import PreTrainedTokenizerBase
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [dict(message) for message in messages]
        offered: list[Any] | None = [dict(tool) for tool in tools] or None
        own = type(self._tokenizer).apply_chat_template
        if own is not PreTrainedTokenizerBase.apply_chat_template:
            # The code of some models has a tokenizer that renders conversations in its own way.
            text = self._tokenizer.apply_chat_template(
                conversation,
                tools=offered,
                chat_template=self.text,
                add_generation_prompt=True,
                tokenize=False,
                **options,
            )
            return str(text)
        # Not through apply_chat_template, which removes values that are None: DeepSeek's first
        # templates write tool calls only where the content is None.
        rendered, _ = render_jinja_template(
            conversations=[conversation],  # pyright: ignore[reportArgumentType]
            tools=offered,
            chat_template=self.text,
            add_generation_prompt=True,
            **{**self._tokenizer.special_tokens_map, **options},
        )
        return str(rendered[0])


def _why(error: Exception) -> str:
    said = str(error).strip()
    if isinstance(error, TemplateSyntaxError):
        return f"the chat template has a syntax error in line {error.lineno}: {error.message}"
    if type(error) is TemplateError:
        # A template's own reason for refusing, such as "roles must alternate".
        said = said or "it gives no reason"
        return f"the chat template refuses the messages: {said}"
    name = type(error).__name__
    said = f"{name}: {said}" if said else name
    return f"the chat template fails for these messages: {said}"
