"""Chats as text, by the tokenizer's chat template, and where in it the answers stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...proto.errors import BadInput, describe_error
from .sources import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # of characters: the first, and the one after the last

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the whole conversation as text.

    Raises BadInput if the tokenizer has no chat template, or if the template fails or leaves out
    what a user says.
    """
    text = _rendered(chat, tokenizer, len(chat.messages))
    for number, message in enumerate(chat.messages):
        # Templates trim contents. They may leave out an assistant's thoughts, but nothing of users.
        if message["role"] == "user" and message.get("content", "").strip() not in text:
            raise BadInput(
                f"{chat.place}: messages[{number}].content: the chat template leaves it out; "
                "templates for images as well as texts take no strings, so use a template for texts"
            )
    return text


def answer_spans(chat: Chat, text: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Return where the answers of the assistant stand in ``text``, the rendered chat.

    These are the parts that the template marks with ``{% generation %}``. Without marks an answer
    is what a message of the assistant adds to the prompt for it: its content, and what the template
    writes at its end. Raises BadInput if the conversation up to an answer is rendered in another
    way than within the whole.
    """
    template = _template(chat, tokenizer)
    if _MARK.search(template):
        return _marked_spans(chat, text, template, tokenizer)
    spans: list[Span] = []
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        asked = _rendered(chat, tokenizer, number, prompt=True)
        answered = _rendered(chat, tokenizer, number + 1)
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise BadInput(
                f"{chat.place}: messages[{number}]: the chat template renders the conversation up "
                "to this answer in another way than within the whole, so the answer cannot be "
                "found in it; mark answers in the template with {% generation %}, end the chat "
                "after its first answer, or set learn to all"
            )
        spans.append((len(asked), len(answered)))
    return spans


def _marked_spans(
    chat: Chat, text: str, template: str, tokenizer: PreTrainedTokenizerBase
) -> list[Span]:
    """Return where the marked parts stand in ``text``.

    The mask of tokens that apply_chat_template makes of these is not used. It is wrong where a part
    begins or ends with a character that no token stands for, such as a space with some tokenizers:
    it leaves out that answer and all later ones, or covers everything that follows the answer, with
    the next questions.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    special: Any = tokenizer.special_tokens_map
    with _failures(chat):
        again, spans = render_jinja_template(
            conversations=[_messages(chat)],  # pyright: ignore[reportArgumentType]
            tools=_tools(chat),
            chat_template=template,
            return_assistant_tokens_mask=True,
            **special,
        )
    if again[0] != text:
        raise BadInput(
            f"{chat.place}: the chat template renders the same conversation in two ways; remove "
            "what changes from the template, or set learn to all"
        )
    found: Any = spans[0]
    return found


def _rendered(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, messages: int, *, prompt: bool = False
) -> str:
    """Return the first ``messages`` as text; with ``prompt`` an answer begins at its end."""
    _template(chat, tokenizer)
    with _failures(chat):
        return str(
            tokenizer.apply_chat_template(
                _messages(chat)[:messages],
                tools=_tools(chat),
                add_generation_prompt=prompt,
                tokenize=False,
            )
        )


def _template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise BadInput(
            f"{chat.place}: the tokenizer has no chat template, which a chat needs; put one beside "
            "the tokenizer (chat_template.jinja), or give texts instead of messages"
        )
    with _failures(chat):
        return tokenizer.get_chat_template(None, _tools(chat))


def _messages(chat: Chat) -> list[dict[str, Any]]:
    return [dict(message) for message in chat.messages]


def _tools(chat: Chat) -> list[Any] | None:
    return [dict(tool) for tool in chat.tools] or None


@contextmanager
def _failures(chat: Chat) -> Iterator[None]:
    """Raise BadInput for whatever a template raises: it is a program that came with the model."""
    try:
        yield
    except Exception as error:
        raise BadInput(
            f"{chat.place}: the chat template fails for these messages or a part of them: "
            f"{describe_error(error)}; change the messages, or the template"
        ) from error
