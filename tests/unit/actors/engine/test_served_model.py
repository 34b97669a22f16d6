"""Between a scripted engine and HTTP: what a client gets of the tokens that were generated."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from moesaic.actors.engine.engine import Delta, RequestLimits, Sampling, TokenLogprob
from moesaic.actors.engine.served_model import ServedModel, TextDelta, TokenChoice
from moesaic.proto.errors import EngineError
from tests.helpers.models.tiny import sentencepiece_like_tokenizer, tiny_tokenizer

LIMITS = RequestLimits(max_prompt_tokens=400, max_total_tokens=500, max_requests=4, vocab_size=400)
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


def tokenizer_with(*, special: bool) -> PreTrainedTokenizerFast:
    """Byte-level, with marks that are tokens of their own."""
    tokenizer = tiny_tokenizer()
    names = ("<tool_call>", "</tool_call>", "<|sep|>")
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return tokenizer


SPECIAL = tokenizer_with(special=True)
METASPACE = sentencepiece_like_tokenizer()


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def served(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], *, step: int = 1, lost_at: int = -1
) -> ServedModel:
    """A model that generates these tokens, ``step`` at a time; its first trunk is lost behind
    ``lost_at`` of them."""

    async def generate(
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        for at in range(len(already), len(ids), step):
            if at == lost_at and not already:
                raise EngineError("the trunk is gone")
            new = tuple(ids[at : at + step])
            top = tuple((token_id, -1.0 - token_id) for token_id in (5, 6))
            logprobs = tuple(TokenLogprob(token_id, -0.5, top) for token_id in new)
            yield Delta(new, logprobs=() if sampling.logprobs is None else logprobs)
        yield Delta((), "stop")

    return ServedModel("m", tokenizer, LIMITS, generate)


async def pieces(model: ServedModel, *stops: str, **options: Any) -> list[TextDelta]:
    sampling = Sampling(max_tokens=400, logprobs=options.pop("logprobs", None))
    prompt = options.pop("prompt", (3,))
    options = {"continues_text": False, **options}
    return [piece async for piece in model.stream("r", prompt, sampling, stops, **options)]


def text_of(found: Sequence[TextDelta]) -> str:
    return "".join(piece.text for piece in found)


def choices_of(found: Sequence[TextDelta]) -> list[TokenChoice]:
    return [choice for piece in found for choice in piece.logprobs]


SAID = "one two<|sep|>three<|im_start|>four"


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|sep|>", "one two"),
        ("<|im_start|>", "one twothree"),
        ("two<|sep|>t", "one "),
        ("o<|s", "one tw"),
        ("|sep", "one two"),
        ("<|sep|>three<|im_start|>", "one two"),
        ("twothree", "one "),  # what the client would see
        ("one", ""),
        ("o", ""),
        ("never", "one twothreefour"),
    ],
)
async def test_stop_strings_and_special_tokens(step: int, stop: str, text: str) -> None:
    model = served(SPECIAL, ids_of(SPECIAL, SAID), step=step)
    found = await pieces(model, stop)
    assert text_of(found) == text
    assert found[-1].finish_reason == "stop"
    assert await pieces(model, stop, continues_text=True) == found


async def test_a_stop_string_ends_the_text_when_its_token_comes() -> None:
    ids = ids_of(SPECIAL, SAID)
    found = await pieces(served(SPECIAL, ids), "<|sep|>")
    assert found[-1].tokens == ids.index(SPECIAL.get_vocab()["<|sep|>"]) + 1


async def test_special_tokens_are_hidden_by_their_id_and_not_by_their_text() -> None:
    spelled = [token_id for c in "<|sep|>" for token_id in ids_of(SPECIAL, c)]
    model = served(SPECIAL, [*ids_of(SPECIAL, "a<|sep|>b"), *spelled])
    assert text_of(await pieces(model)) == "ab<|sep|>"
    assert text_of(await pieces(model, "b<|")) == "a"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("step", [1, 100])
async def test_calls_whose_marks_are_tokens(special: bool, step: int) -> None:
    tokenizer = tokenizer_with(special=special)
    model = served(tokenizer, ids_of(tokenizer, f"Wait. {CALL}"), step=step)
    found = await pieces(model, calls="many")
    assert text_of(found) == "Wait. "
    calls = [(call.name, call.arguments) for piece in found for call in piece.calls]
    assert calls == [("f", '{"a": 1}')]
    assert found[-1].finish_reason == "tool_calls"


async def test_a_stream_that_goes_on_elsewhere_stops_where_it_would_have() -> None:
    ids = ids_of(SPECIAL, SAID)
    model = served(SPECIAL, ids, lost_at=ids.index(SPECIAL.get_vocab()["<|sep|>"]))
    whole = await pieces(model, resumable=True, logprobs=0)
    assert text_of(whole) == "one twothreefour"
    assert len(choices_of(whole)) == len(ids)
    assert text_of(await pieces(model, "two<|sep|>", resumable=True)) == "one "


# ---- log-probabilities --------------------------------------------------------------------------

TEXTS = st.lists(
    st.sampled_from(["one", " two", "<|sep|>", "🙂", "é", "<", "t", "\n"]), max_size=12
)


@given(TEXTS, st.sampled_from(["", "<|sep|>", "two", "e🙂", "🙂", "é"]), st.integers(1, 4))
async def test_log_probabilities_are_those_of_the_text(
    parts: list[str], stop: str, step: int
) -> None:
    ids = ids_of(SPECIAL, "".join(parts))
    found = await pieces(served(SPECIAL, ids, step=step), *filter(None, [stop]), logprobs=2)
    text, choices = text_of(found), choices_of(found)
    raw = b"".join(one.chosen.bytes for one in choices)
    cut = raw[: len(text.encode())]
    # The last token may reach into the stop string, with which it began.
    assert cut == text.encode()
    assert raw == cut or len(raw) - len(cut) < len(choices[-1].chosen.bytes)
    sent = ""
    for piece in found:
        sent += piece.text
        if piece is not found[-1]:
            assert all(one.offset < len(sent) for one in piece.logprobs if one.chosen.bytes)
    for one in choices:
        said = one.chosen.text
        if one.chosen.bytes == said.encode():
            assert (text[one.offset :] + stop).startswith(said[: len(text) - one.offset])
        assert len(one.top) == 2


@pytest.mark.parametrize("step", [2, 400])
async def test_log_probabilities_end_with_the_last_call_that_is_wanted(step: int) -> None:
    """However many tokens came at a time."""
    ids = ids_of(SPECIAL, f"I look. {CALL}\n{CALL} and so on")
    one, many = [
        choices_of(await pieces(served(SPECIAL, ids, step=n), logprobs=2, calls="one"))
        for n in (1, step)
    ]
    assert one == many
    assert one[-1].chosen.text.endswith("}")


async def test_alternatives_are_written_where_the_token_stands() -> None:
    """At the begin of an answer sentencepiece drops the space, and nowhere else."""
    vocabulary = METASPACE.get_vocab()

    async def generate(
        request_id: str, prompt_ids: Sequence[int], sampling: Sampling, already: Sequence[int] = ()
    ) -> AsyncGenerator[Delta, None]:
        for name, other in (("▁the", "▁fox"), ("▁fox", "▁the"), ("<0xC3>", "</s>")):
            top = ((vocabulary[name], -0.5), (vocabulary[other], -1.0))
            yield Delta((vocabulary[name],), logprobs=(TokenLogprob(*top[0], top),))
        yield Delta((), "stop")

    model = ServedModel("m", METASPACE, LIMITS, generate)
    for continues, begin in ((False, ""), (True, " ")):
        found = await pieces(
            model, logprobs=2, continues_text=continues, prompt=[vocabulary["▁quick"]]
        )
        tops = [[other.text for other in one.top] for one in choices_of(found)]
        assert tops == [
            [f"{begin}the", f"{begin}fox"], [" fox", " the"], ["bytes:\\xc3", "</s>"]
        ]  # fmt: skip
        assert [one.top[0] for one in choices_of(found)] == [
            one.chosen for one in choices_of(found)
        ]
        assert text_of(found) == f"{begin}the fox\ufffd"
        assert [one.offset for one in choices_of(found)] == [0, len(begin) + 3, len(begin) + 7]


# ---- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [["<s>"], ["<unk>", "<s>"]])
async def test_what_the_tokenizer_puts_before_a_text_is_there_once(prefix: list[str]) -> None:
    tokenizer = sentencepiece_like_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(prefix)
    assert isinstance(ids, list)
    model, text = served(tokenizer, []), "".join(prefix)
    # A tokenizer that adds nothing gets what it is given.
    assert await model.encode(text * 2 + "the") == [*ids, *ids, *ids_of(tokenizer, "the")]
    added = list(zip(prefix, ids, strict=True))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*prefix, "$A"], special_tokens=added
    )
    model = served(tokenizer, [])
    for said in ("the", f"{text}the"):
        assert await model.encode(said) == [*ids, *ids_of(tokenizer, "the")]
    assert await model.encode(text) == ids
    assert await model.encode(text * 2 + "the") == [*ids, *ids, *ids_of(tokenizer, "the")]


async def test_a_prompt_of_ids_beyond_the_tokenizer_is_echoed_without_them() -> None:
    assert served(SPECIAL, []).decode([399, *ids_of(SPECIAL, "the<|sep|>fox")]) == "thefox"
