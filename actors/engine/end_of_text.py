"""The tokens that end a model's text, by everything that names one.

``generation_config.json``, ``config.json`` and the tokenizer each may name other ones, and
checkpoints are published in which only one of them has it right. Where a chat template writes none
of those, the token that it writes behind an answer ends the text, too: that is what a model has
learnt to say there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Texts of the messages that a template is tried with; nothing that a template would change.
_ASKED, _THOUGHT, _SAID, _CALLED = "askedqz", "thoughtqz", "saidqz", "calledqz"


def end_of_text(
    config: PretrainedConfig,
    generation: GenerationConfig | None,
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None,
) -> list[int]:
    """Their ids, in order. ``tokenizer`` loads the model's; without, only the configurations
    count. What is left out is logged with the reason; nothing here keeps an engine from starting.
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
                where, token_id, size - 1,
            )  # fmt: skip
        elif loaded is not None and _is_nobodys(token_id, text_config, loaded):
            log.warning(
                "end of text: token %d is left out: it is the default of %s, and ordinary text "
                "(%r) to the tokenizer",
                token_id, type(text_config).__name__, loaded.decode([token_id]),
            )  # fmt: skip
        else:
            continue
        del named[token_id]
    if loaded is not None:
        turn_end = _turn_end(loaded, frozenset(named))
        if turn_end is not None and turn_end < size:
            log.info(
                "end of text: the chat template writes none of %s; %r, which it writes behind an "
                "answer, ends it",
                sorted(named), loaded.convert_ids_to_tokens(turn_end),
            )  # fmt: skip
            named[turn_end] = "the chat template"
    return sorted(named)


def _load(tokenizer: Callable[[], PreTrainedTokenizerBase] | None) -> Any:
    if tokenizer is None:
        return None
    try:
        return tokenizer()
    except Exception as error:
        # Whatever is wrong with it, token ids can be served without; what needs it will say so.
        log.warning(
            "end of text: the configurations alone count, without a tokenizer: %s",
            str(error).partition("\n")[0] or type(error).__name__,
        )
        return None


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]


def _is_nobodys(token_id: int, config: PretrainedConfig, tokenizer: Any) -> bool:
    """Whether the token is only the default of the configuration's class, and ordinary text to the
    tokenizer: 2 ended texts in Llama's first tokenizer, and is ``#`` in its third."""
    if token_id not in _ids(getattr(type(config), "eos_token_id", None)):
        return False
    added = tokenizer.added_tokens_decoder
    return token_id not in added and token_id not in tokenizer.all_special_ids


# ---- what a chat template writes behind an answer -----------------------------------------------


def _turn_end(tokenizer: Any, named: frozenset[int]) -> int | None:
    """The token that a chat template writes behind an assistant's content; None where it writes
    one of ``named``, or none, or one that does not end the assistant's turn."""
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
        # The first one begins the text, and may be the one that ends it as well.
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
    """Whether a template also writes the mark between an assistant's thinking, content and calls of
    tools, as gpt-oss's does with its ``<|end|>``: it ends parts of an answer, not the answer."""
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
        # Templates fail in every way that a program can.
        log.info("end of text: the chat template does not render %s: %s", messages, error)
        return None
    return str(text)
