"""Detokenizing and stop strings: whatever the pieces are, they add up to the one right text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from moesaic.actors.text.detokenizer import Detokenizer, StopSearch, Written
from moesaic.actors.text.marked_text import MarkedText
from moesaic.actors.text.vocabulary import Vocabulary
from tests.helpers.models.tiny import sentencepiece_like_tokenizer, tiny_tokenizer

BYTE_LEVEL = tiny_tokenizer()
METASPACE = sentencepiece_like_tokenizer()
# Special tokens in the form of DeepSeek's, one that the byte-level decoder breaks, and one that is
# added and not special.
BYTE_LEVEL.add_tokens(
    [AddedToken(name, special=True, normalized=False) for name in ("<｜end▁of▁text｜>", "<é>")]
    + [AddedToken("<tool_call>", special=False, normalized=False)]
)
BOTH = pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, METASPACE], ids=["byte-level", "metaspace"]
)
VOCABULARIES = {id(one): Vocabulary(one) for one in (BYTE_LEVEL, METASPACE)}
ALPHABET = "the quick fox. ßéöλ日本🙂👩\u200d🚀\u0301\n "
TEXTS = st.text(alphabet=st.sampled_from(ALPHABET), min_size=0, max_size=30)
BYTE_LEVEL_IDS = st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=40)
# Whole texts with special tokens between them.
MIXED = st.lists(st.one_of(TEXTS, st.integers(0, 2)), max_size=6)


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], *, skip: bool = True) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def name_of(tokenizer: PreTrainedTokenizerFast, token_id: int) -> str:
    name = tokenizer.convert_ids_to_tokens(token_id)
    assert isinstance(name, str)
    return name


def id_of(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    return tokenizer.get_vocab()[name]


def encode_mixed(tokenizer: PreTrainedTokenizerFast, parts: Sequence[str | int]) -> list[int]:
    """Texts, and numbers of special tokens."""
    return [
        token_id
        for part in parts
        for token_id in ([part] if isinstance(part, int) else encode(tokenizer, part))
    ]


def begin(tokenizer: PreTrainedTokenizerFast, context: Sequence[int] = ()) -> Detokenizer:
    return Detokenizer(VOCABULARIES[id(tokenizer)], context=context)


def marked(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], context: Sequence[int] = ()
) -> list[MarkedText]:
    detokenizer = begin(tokenizer, context)
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.flush()]


def pieces(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], context: Sequence[int] = ()
) -> list[str]:
    return [piece.visible for piece in marked(tokenizer, ids, context)]


def written(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], context: Sequence[int] = ()
) -> list[Written]:
    detokenizer = begin(tokenizer, context)
    found = []
    for token_id in ids:
        found.append(detokenizer.look(token_id))
        detokenizer.push([token_id])
    return found


@given(st.lists(st.integers(0, 319), max_size=40))
def test_any_byte_level_tokens_add_up_to_the_decoded_whole(ids: list[int]) -> None:
    # Random ids are mostly invalid UTF-8, special tokens among them.
    out = marked(BYTE_LEVEL, ids)
    assert "".join(piece.text for piece in out) == decoded(BYTE_LEVEL, ids, skip=False)
    ordinary = [token_id for token_id in ids if token_id > 2]
    assert "".join(pieces(BYTE_LEVEL, ordinary)) == decoded(BYTE_LEVEL, ordinary)


@given(st.lists(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=6), max_size=10))
def test_tokens_that_come_together_decode_as_those_that_come_alone(steps: list[list[int]]) -> None:
    detokenizer = begin(BYTE_LEVEL)
    text = "".join(detokenizer.push(step).text for step in steps) + detokenizer.flush().text
    ids = [token_id for step in steps for token_id in step]
    assert text == "".join(piece.text for piece in marked(BYTE_LEVEL, ids))


@BOTH
@given(text=TEXTS)
def test_no_broken_character_is_ever_given_out(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    ids = encode(tokenizer, text)
    out = pieces(tokenizer, ids)
    assert "\ufffd" not in "".join(out)
    assert "".join(out) == decoded(tokenizer, ids)


@BOTH
@given(parts=MIXED)
def test_special_tokens_are_known_and_change_no_other_text(
    tokenizer: PreTrainedTokenizerFast, parts: list[str | int]
) -> None:
    ids = encode_mixed(tokenizer, parts)
    out = marked(tokenizer, ids)
    whole = sum(out, MarkedText())
    assert whole.visible == decoded(tokenizer, ids)
    said = [whole.text[start:end] for start, end in whole.special]
    special = [name_of(tokenizer, one) for one in ids if one <= 2]
    assert said == special


def test_special_tokens_write_their_own_text_whatever_the_decoder_makes_of_it() -> None:
    ids = [id_of(BYTE_LEVEL, name) for name in ("<｜end▁of▁text｜>", "<é>")]
    assert [piece.text for piece in marked(BYTE_LEVEL, ids)] == ["<｜end▁of▁text｜>", "<é>", ""]
    assert pieces(BYTE_LEVEL, ids) == ["", "", ""]


def test_an_added_token_that_is_not_special_is_text() -> None:
    token_id = id_of(BYTE_LEVEL, "<tool_call>")
    assert pieces(BYTE_LEVEL, [token_id]) == ["<tool_call>", ""]


def test_a_special_token_spelled_with_ordinary_ones_is_text() -> None:
    ids = [token_id for c in "<|im_end|>" for token_id in encode(BYTE_LEVEL, c)]
    assert "".join(pieces(BYTE_LEVEL, ids)) == "<|im_end|>"


@BOTH
def test_ids_beyond_the_tokenizer_write_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "the fox")
    ids[1:1] = [len(tokenizer), len(tokenizer) + 100]
    ids.insert(0, len(tokenizer))
    assert "".join(pieces(tokenizer, ids)) == "the fox"
    assert written(tokenizer, ids)[0][:2] == ("", b"")


@given(TEXTS, TEXTS)
def test_a_completion_keeps_the_space_after_its_prompt(prompt: str, answer: str) -> None:
    # An answer's own tokens: what its text adds when it is encoded behind the prompt.
    prompt_ids = encode(METASPACE, prompt or "a")
    ids = encode(METASPACE, answer)
    text = "".join(pieces(METASPACE, ids, context=prompt_ids))
    assert decoded(METASPACE, prompt_ids) + text == decoded(METASPACE, [*prompt_ids, *ids])


@given(st.lists(st.integers(3, len(METASPACE) - 1), max_size=40))
def test_bytes_that_make_no_character_lose_no_other_text(ids: list[int]) -> None:
    # Byte fallback decodes a run with one bad byte as all bad, so the whole cannot be equal; all
    # that is not a replacement character must be there, and more, never less.
    whole = re.sub("\ufffd+", "", decoded(METASPACE, ids))
    rest = iter("".join(pieces(METASPACE, ids)))
    assert all(character in rest for character in whole)


def test_a_character_of_several_tokens_comes_in_one_piece() -> None:
    ids = encode(METASPACE, "fox🙂!")
    assert [piece for piece in pieces(METASPACE, ids) if piece][-2:] == ["🙂", "!"]


def test_special_tokens_do_not_swallow_the_next_space() -> None:
    vocabulary = METASPACE.get_vocab()
    ids = [vocabulary["▁the"], METASPACE.eos_token_id, vocabulary["▁fox"]]
    assert pieces(METASPACE, ids) == ["the", "", " fox", ""]


@BOTH
def test_a_special_token_ends_an_unfinished_character(tokenizer: PreTrainedTokenizerFast) -> None:
    *_, first, second, third = encode(tokenizer, "🙂")
    ids = [first, 2, second, third, *encode(tokenizer, " fox")]
    out = marked(tokenizer, ids)
    assert out[1].text == "\ufffd" + name_of(tokenizer, 2)
    text = sum(out, MarkedText()).visible
    assert text.lstrip("\ufffd").lstrip() == "fox"


def test_an_unfinished_character_is_flushed_as_broken() -> None:
    ids = encode(BYTE_LEVEL, "🙂")
    assert len(ids) > 1
    assert "".join(pieces(BYTE_LEVEL, ids[:-1])) == "\ufffd"


@BOTH
@pytest.mark.parametrize("prompt", ["", "the quick"], ids=["alone", "behind a prompt"])
@given(parts=MIXED)
def test_the_bytes_of_all_tokens_are_the_texts_and_each_has_its_place(
    tokenizer: PreTrainedTokenizerFast, prompt: str, parts: list[str | int]
) -> None:
    ids, context = encode_mixed(tokenizer, parts), encode(tokenizer, prompt)
    whole = sum(marked(tokenizer, ids, context), MarkedText())
    text, found = whole.visible, written(tokenizer, ids, context)
    assert b"".join(one.bytes for one in found) == text.encode()
    at = 0
    for token_id, one in zip(ids, found, strict=True):
        assert one.offset == len(text.encode()[:at].decode(errors="ignore"))
        at += len(one.bytes)
        if token_id <= 2:
            assert (one.text, one.bytes) == (name_of(tokenizer, token_id), b"")
            assert whole.text[one.start :].startswith(one.text)
        elif not one.text.startswith("bytes:"):
            assert text[one.offset :].startswith(one.text)
            assert one.text.encode() == one.bytes


@given(st.lists(st.integers(3, 319), max_size=40))
def test_bytes_that_make_no_text_are_all_there(ids: list[int]) -> None:
    raw = b"".join(one.bytes for one in written(BYTE_LEVEL, ids))
    assert raw.decode(errors="replace") == decoded(BYTE_LEVEL, ids)


@BOTH
def test_parts_of_characters_differ_and_are_at_its_place(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = encode(tokenizer, "fox🙂!")
    found = written(tokenizer, ids)
    parts = [one for one in found if one.text.startswith("bytes:")]
    assert len({one.text for one in parts}) == len(parts) > 1
    assert {one.offset for one in parts} == {3}
    assert found[-1][:2] == ("!", b"!")
    assert found[-1].offset == 4


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """The slow reference: read character by character until some stop string is complete."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return end - max(map(len, done))
    return None


AB = st.text(alphabet="ab<", max_size=4)
PARTS = st.lists(st.tuples(AB, st.booleans()), max_size=12)
STOPS = AB.filter(bool)


def part(text: str, special: bool) -> MarkedText:
    return MarkedText(text, ((0, len(text)),) if special and text else ())


def first_stops(whole: MarkedText, stops: Sequence[str]) -> int | None:
    """The slow reference, in the whole text and in the visible one."""
    for end in range(1, len(whole) + 1):
        starts = [end - len(stop) for stop in stops if whole.text[:end].endswith(stop)]
        visible = whole[:end].visible
        if whole[end - 1 : end].visible:
            for stop in stops:
                if visible.endswith(stop):
                    # The last place from which on so much is visible.
                    places = range(end)
                    starts.append(max(p for p in places if len(whole[p:end].visible) == len(stop)))
        if starts:
            return min(starts)
    return None


@given(PARTS, st.lists(STOPS, max_size=4))
def test_the_text_ends_before_the_first_complete_stop_string(
    parts: list[tuple[str, bool]], stops: list[str]
) -> None:
    search = StopSearch(stops)
    pieces = [part(*one) for one in parts]
    whole, sent, found = sum(pieces, MarkedText()), MarkedText(), False
    for piece in pieces:
        out, found = search.push(piece)
        sent += out
        if found:
            break
    else:
        sent += search.flush()
    cut = first_stops(whole, stops)
    assert sent.text == whole.text[:cut]
    assert sent.visible == whole[:cut].visible
    assert found == (cut is not None)
    assert not any(stop in sent.text or stop in sent.visible for stop in stops)


@given(st.lists(AB, max_size=12), st.lists(STOPS, min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_begin_a_stop_string(
    parts: list[str], stops: list[str]
) -> None:
    search = StopSearch(stops)
    text = sent = ""
    for one in parts:
        text += one
        out, found = search.push(MarkedText(one))
        sent += out.text
        if found:
            assert first_stop(text, stops) == len(sent)
            return
        held = text[len(sent) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_without_stop_strings_all_passes() -> None:
    search = StopSearch(())
    assert search.push(MarkedText("anything")) == (MarkedText("anything"), False)
    assert search.flush() == MarkedText()


def test_a_stop_string_over_three_pieces() -> None:
    search = StopSearch(["</end>"])
    found = [search.push(MarkedText(piece)) for piece in ("a</", "en", "d> b")]
    assert [(text.text, stopped) for text, stopped in found] == [
        ("a", False),
        ("", False),
        ("", True),
    ]


@pytest.mark.parametrize("stop", ["<|x|>", "a<|x", "|x|>b", "x", "ab", "a<|x|>b", "<"])
def test_a_stop_string_in_beside_and_around_a_special_token(stop: str) -> None:
    search = StopSearch([stop])
    sent, stopped = "", False
    for piece in (MarkedText("-a"), part("<|x|>", True), MarkedText("b-")):
        out, stopped = search.push(piece)
        sent += out.visible
        if stopped:
            break
    assert stopped
    assert sent == ("-" if stop.startswith("a") else "-a")
