"""The tokens that end a model's text, collected from every source that names one.

``generation_config.json``, ``config.json`` and the tokenizer may each name different ones, and in
some published checkpoints only one of them is right. If a chat template writes none of those, the
token that it writes after an answer ends the text, too: the model was trained to write it there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Texts of the messages that templates are tried with; no template changes such words.
_ASKED, _THOUGHT, _SAID, _CALLED = "askedqz", "thoughtqz", "saidqz", "calledqz"


def end_of_text(
    config: PretrainedConfig,
    generation: GenerationConfig | None,
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None,
) -> list[int]:
    """Return the ids of the tokens that end a text, in order.

    ``tokenizer`` loads the model's; with None only the configurations count. Ids that are left
    out are logged with the reason. Nothing here keeps an engine from starting.
    """
    loaded = _load(tokenizer)
    text_config = config.get_text_config()
    named: dict[int, str] = {}
    for where, value in (
        ("generation_config.json", getattr(generation, "eos_token_id", None)),
        ("config.json", getattr(config, "eos_token_id", None)),
        ("config.json", getattr(text_config, "eos_token_id", None)),
        ("the tokenizer", getattr(loaded, "eos_token_id", None)),
    ):
        for token_id in _ids(value):
            named.setdefault(token_id, where)
    size = int(text_config.vocab_size)
    for token_id, where in list(named.items()):
        if not 0 <= token_id < size:
            log.warning(
                "end of text: %s names token %d, which the model does not have (0 to %d)",
                where,
                token_id,
                size - 1,
            )
        elif loaded is not None and _is_nobodys(token_id, text_config, loaded):
            log.warning(
                "end of text: token %d is left out: it is the default of %s, and ordinary text "
                "(%r) to the tokenizer",
                token_id,
                type(text_config).__name__,
                loaded.decode([token_id]),
            )
        else:
            continue
        del named[token_id]
    if loaded is not None:
        turn_end = _turn_end(loaded, frozenset(named))
        if turn_end is not None and turn_end < size:
            log.info(
                "end of text: the chat template writes none of the tokens %s; so the token %r, "
                "which it writes after an answer, also ends a text",
                sorted(named),
                loaded.convert_ids_to_tokens(turn_end),
            )
            named[turn_end] = "the chat template"
    return sorted(named)


def _load(tokenizer: Callable[[], PreTrainedTokenizerBase] | None) -> Any:
    if tokenizer is None:
        return None
    try:
        return tokenizer()
    except Exception as error:
        # Token ids can be served without a tokenizer. Whatever else needs one raises its own error.
        log.warning(
            "end of text: only the configurations count, since the tokenizer does not load: %s",
            str(error).partition("\n")[0] or type(error).__name__,
        )
        return None


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]


def _is_nobodys(token_id: int, config: PretrainedConfig, tokenizer: Any) -> bool:
    """Return whether the id is only the default of the configuration's class, and ordinary text.

    For example 2 ended texts in Llama's first tokenizer, and is ``#`` in its third.
    """
    if token_id not in _ids(getattr(type(config), "eos_token_id", None)):
        return False
    added = tokenizer.added_tokens_decoder
    return token_id not in added and token_id not in tokenizer.all_special_ids


# ---- what a chat template writes after an answer ------------------------------------------------


def _turn_end(tokenizer: Any, named: frozenset[int]) -> int | None:
    """Return the token that a chat template writes after an assistant's content.

    Returns None where the template writes one of ``named``, or no token, or one that does not
    end the assistant's turn.
    """
    if not tokenizer.chat_template:
        return None
    user, again = ({"role": "user", "content": text} for text in (_ASKED, _ASKED + "again"))
    answer = {"role": "assistant", "content": _SAID}
    last = _render(tokenizer, [user, answer])
    if last is None:
        return None
    texts = [last, _render(tokenizer, [user, answer, again]) or ""]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        # The first token begins the text; in some vocabularies the same token also ends it.
        if named.intersection(ids[1:]):
            return None
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    for text in texts:
        found = _token_behind(text, _SAID, added)
        if found is not None and not _inside_turn(tokenizer, user, added[found]):
            return found
    return None


def _token_behind(text: str, said: str, added: Mapping[int, str]) -> int | None:
    _, found, behind = text.rpartition(said)
    behind = behind.lstrip()
    begins = [token_id for token_id, mark in added.items() if mark and behind.startswith(mark)]
    return max(begins, key=lambda token_id: len(added[token_id]), default=None) if found else None


def _inside_turn(tokenizer: Any, user: Mapping[str, Any], mark: str) -> bool:
    """Return whether a template also writes the mark inside an assistant's turn.

    gpt-oss's does so with its ``<|end|>``, between thinking, content and tool calls: there the
    mark ends parts of an answer, not the answer.
    """
    thinking = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _THOUGHT)
    call = {"type": "function", "function": {"name": _CALLED, "arguments": {}}, "id": "qz0000000"}
    thought = {"role": "assistant", "content": _SAID, **thinking}
    calls = {"role": "assistant", "content": _SAID, "tool_calls": [call]}
    for message, first, second in (
        (thought, _THOUGHT, _SAID),
        (calls, _SAID, _CALLED),
        ({**calls, "content": "", **thinking}, _THOUGHT, _CALLED),
    ):
        text = _render(tokenizer, [user, message]) or ""
        _, begun, behind = text.partition(first)
        between, ended, _ = behind.partition(second)
        if begun and ended and mark in between:
            return True
    return False


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str | None:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except Exception as error:
        # A template is a program and may raise anything.
        log.debug("end of text: the chat template does not render %s: %s", messages, error)
        return None
    return str(text)
