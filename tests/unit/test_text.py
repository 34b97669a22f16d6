"""Detokenizing and stop strings: whatever the pieces are, they add up to the one right text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from moesaic.actors.text import Detokenizer, StopSearch
from tests.helpers.tiny import sentencepiece_like_tokenizer, tiny_tokenizer

BYTE_LEVEL = tiny_tokenizer()
METASPACE = sentencepiece_like_tokenizer()
TEXTS = st.text(
    alphabet=st.sampled_from("the quick fox. ßéöλ日本🙂👩‍🚀\u0301\n "), min_size=0, max_size=30
)


def decoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[Sequence[int]], str]:
    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    return decode


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def pieces(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], context: Sequence[int] = ()
) -> list[str]:
    detokenizer = Detokenizer(decoder(tokenizer), context=context)
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.flush()]


@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=40))
def test_any_byte_level_tokens_add_up_to_the_decoded_whole(ids: list[int]) -> None:
    # Random ids are mostly invalid UTF-8, special tokens among them.
    assert "".join(pieces(BYTE_LEVEL, ids)) == decoder(BYTE_LEVEL)(ids)


@given(st.lists(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=6), max_size=10))
def test_tokens_that_come_together_decode_as_those_that_come_alone(steps: list[list[int]]) -> None:
    detokenizer = Detokenizer(decoder(BYTE_LEVEL))
    text = "".join(map(detokenizer.push, steps)) + detokenizer.flush()
    assert text == decoder(BYTE_LEVEL)([token_id for step in steps for token_id in step])


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE], ids=["byte-level", "metaspace"])
@given(text=TEXTS)
def test_no_broken_character_is_ever_given_out(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    ids = encode(tokenizer, text)
    out = pieces(tokenizer, ids)
    assert "\ufffd" not in "".join(out)
    assert "".join(out) == decoder(tokenizer)(ids)


@given(TEXTS, TEXTS)
def test_a_completion_keeps_the_space_after_its_prompt(prompt: str, answer: str) -> None:
    # An answer's own tokens: what its text adds when it is encoded behind the prompt.
    prompt_ids = encode(METASPACE, prompt or "a")
    ids = encode(METASPACE, answer)
    decode = decoder(METASPACE)
    text = "".join(pieces(METASPACE, ids, context=prompt_ids))
    assert decode(prompt_ids) + text == decode([*prompt_ids, *ids])


@given(st.lists(st.integers(0, len(METASPACE) - 1), max_size=40))
def test_bytes_that_make_no_character_lose_no_other_text(ids: list[int]) -> None:
    # Byte fallback decodes a run with one bad byte as all bad, so the whole cannot be equal; all
    # that is not a replacement character must be there, and more, never less.
    whole = re.sub("\ufffd+", "", decoder(METASPACE)(ids))
    text = "".join(pieces(METASPACE, ids))
    rest = iter(text)
    assert all(character in rest for character in whole)


def test_a_character_of_several_tokens_comes_in_one_piece() -> None:
    ids = encode(METASPACE, "fox🙂!")
    assert [piece for piece in pieces(METASPACE, ids) if piece][-2:] == ["🙂", "!"]


def test_special_tokens_do_not_swallow_the_next_space() -> None:
    vocabulary = METASPACE.get_vocab()
    ids = [vocabulary["▁the"], METASPACE.eos_token_id, vocabulary["▁fox"]]
    assert pieces(METASPACE, ids) == ["the", "", " fox", ""]


def test_an_unfinished_character_is_flushed_as_broken() -> None:
    ids = encode(BYTE_LEVEL, "🙂")
    assert len(ids) > 1
    assert "".join(pieces(BYTE_LEVEL, ids[:-1])) == "\ufffd"


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """The slow reference: read character by character until some stop string is complete."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return end - max(map(len, done))
    return None


AB = st.text(alphabet="ab<", max_size=4)


@given(st.lists(AB, max_size=12), st.lists(AB.filter(bool), max_size=4))
def test_the_text_ends_before_the_first_complete_stop_string(
    parts: list[str], stops: list[str]
) -> None:
    search = StopSearch(stops)
    text, sent, found = "".join(parts), "", False
    for part in parts:
        out, found = search.push(part)
        sent += out
        if found:
            break
    else:
        sent += search.flush()
    cut = first_stop(text, stops)
    assert sent == text[:cut]
    assert found == (cut is not None)


@given(st.lists(AB, max_size=12), st.lists(AB.filter(bool), min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_begin_a_stop_string(
    parts: list[str], stops: list[str]
) -> None:
    search = StopSearch(stops)
    text = sent = ""
    for part in parts:
        text += part
        out, found = search.push(part)
        sent += out
        if found:
            return
        held = text[len(sent) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_without_stop_strings_all_passes() -> None:
    search = StopSearch(())
    assert search.push("anything") == ("anything", False)
    assert search.flush() == ""


def test_a_stop_string_over_three_pieces() -> None:
    search = StopSearch(["</end>"])
    assert [search.push(piece) for piece in ("a</", "en", "d> b")] == [
        ("a", False),
        ("", False),
        ("", True),
    ]
