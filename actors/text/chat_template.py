"""Render conversations as the text of a prompt, with a model's chat template.

Each template is probed once, with small conversations: in which form it takes messages
(``template_form.py``), and which of them it leaves out (``template_reach.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...proto.errors import RequestError
from .template_form import TemplateForm
from .template_reach import Omission, Reach, reasoning
from .template_source import TemplateSource
from .thinking import Thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers' names for the templates of a tokenizer that has several.
_DEFAULT, _WITH_TOOLS = "default", "tool_use"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as token ids.

    ``thinking`` is None where the template has no marks of thinking.
    """

    token_ids: list[int]
    thinking: Thinking | None = None

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a prompt; ``thinking`` as in `ChatPrompt`."""

    text: str
    thinking: Thinking | None = None


class _Template:
    """One template, and what probing it showed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.source = TemplateSource(tokenizer, text)
        self.form = TemplateForm(self.source)
        self.thinking = Thinking.of(text)
        self.reach = Reach(self.source, self.form, self.thinking)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any] | None,
    ) -> tuple[Rendered, Omission | None]:
        offered = self.form.fit_tools(tools)
        text = self.source.render(self.form.fit(messages), offered, options)
        lost, opened = self.reach.look(messages, offered, options, text)
        return Rendered(text, self.thinking and replace(self.thinking, opened=opened)), lost


class ChatTemplate:
    """The chat template of one tokenizer, or its several named ones."""

    def __init__(self, model_id: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model_id = model_id
        self._tokenizer = tokenizer
        self._templates: dict[str, _Template] = {}

    @property
    def exists(self) -> bool:
        """Whether the model has a template; without one it completes texts and answers no chats."""
        return bool(self._tokenizer.chat_template)

    def probe(self) -> None:
        """Render one plain message of a user, to see whether the template works.

        Takes milliseconds. Raises RequestError, with the template's own message, where the
        template fails or leaves the message out.
        """
        self.render([{"role": "user", "content": "Hello."}])

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Return the prompt's text.

        The arguments of a call are JSON text, as in the API. ``options`` are further
        variables of the template (``chat_template_kwargs``). Raises RequestError where the
        template refuses, fails, or leaves a message out.
        """
        template = self._choose(tools)
        spoken = [_with_reasoning(message) for message in messages]
        try:
            rendered, lost = template.render(spoken, tools, options)
        except RequestError as refused:
            error, part = refused, any(map(_has_both, messages))
        else:
            if lost is None:
                return rendered
            error = self._lost(lost, messages)
            part = lost.at is not None and _has_both(messages[lost.at])
        if not part:
            raise error
        try:
            rendered, lost = template.render(_apart(spoken), tools, options)
        except RequestError:
            raise error from None  # the first error is about the messages as they were sent
        if lost is not None:
            raise error
        return rendered

    def _choose(self, tools: Sequence[Mapping[str, Any]]) -> _Template:
        text = self._tokenizer.chat_template
        if not text:
            raise RequestError(
                f"the model {self._model_id!r} has no chat template; use /v1/completions",
                param="messages",
            )
        if isinstance(text, dict):
            text = self._named(text, bool(tools))
        if not isinstance(text, str):
            raise RequestError(
                f"the chat template of {self._model_id!r} is not a text (got {text!r:.60})",
                param="messages",
            )
        if text not in self._templates:
            self._templates[text] = _Template(self._tokenizer, text)
        template = self._templates[text]
        if tools and template.form.tools is None:
            # A template that fails for every conversation raises its own error here.
            template.source.render(template.form.fit([{"role": "user", "content": "Hello."}]))
            raise RequestError(
                f"the chat template of {self._model_id!r} does not support tools", param="tools"
            )
        return template

    def _named(self, templates: Mapping[str, str], with_tools: bool) -> str:
        """Choose as transformers does; where neither of its names exists, the only template."""
        wanted = (_WITH_TOOLS, _DEFAULT) if with_tools else (_DEFAULT, _WITH_TOOLS)
        for name in (*wanted, *(templates if len(templates) == 1 else ())):
            if name in templates:
                return templates[name]
        raise RequestError(
            f"the model {self._model_id!r} has the chat templates {sorted(templates)}, but none "
            f"is named {_DEFAULT!r} or {_WITH_TOOLS!r}",
            param="messages",
        )

    def _lost(self, lost: Omission, messages: Sequence[Mapping[str, Any]]) -> RequestError:
        template = f"the chat template of {self._model_id!r}"
        if lost.at is None:
            return RequestError(
                f"{template} does not tell the model about tools in this conversation",
                param="tools",
            )
        path, message = f"messages[{lost.at}]", messages[lost.at]
        role = message["role"]
        if lost.call is not None:
            path += f".tool_calls[{lost.call}]"
            beside = " beside its text" if (message.get("content") or "").strip() else ""
            what = f"a call of a message with the role {role!r}{beside}"
        else:
            beside = " beside tool_calls" if message.get("tool_calls") else ""
            what = f"the text of a message with the role {role!r}{beside}"
        return RequestError(
            f"{path}: {template} leaves out {what} at this place; it would not reach the model",
            param=path,
        )


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    text = message.get("reasoning_content")
    return {**message, **reasoning(text)} if text else message


def _has_both(message: Mapping[str, Any]) -> bool:
    """Return whether a message has text and calls."""
    return bool(message.get("tool_calls") and (message.get("content") or "").strip())


def _apart(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages with text and calls in messages of their own.

    Models send both in one message. But many templates (Llama's, Mistral's, DeepSeek's first)
    write only one of the two, and gpt-oss's refuses both together with thinking.
    """
    apart = list[Mapping[str, Any]]()
    for message in messages:
        if _has_both(message):
            apart.append({key: value for key, value in message.items() if key != "tool_calls"})
            message = {"role": "assistant", "content": "", "tool_calls": message["tool_calls"]}
        apart.append(message)
    return apart
