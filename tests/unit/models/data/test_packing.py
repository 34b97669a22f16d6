"""Texts and chats as tokens, and which of these are learned."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moesaic.models.data import packing
from moesaic.models.data.chats import answer_spans, render
from moesaic.models.data.packing import pack
from moesaic.models.data.sources import Chat, Document, Text
from moesaic.proto.errors import BadInput
from tests.helpers.models.tiny import tiny_tokenizer

WORDS = ["<unk>", "<bos>", "<end>", "<user>", "<assistant>", "hi", "yes", "no", "why", "so", "."]
PLAIN = (
    "<bos>{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The marked part begins and ends with a space, for which there is no token.
MARKED = (
    "<bos>{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %} {{ m.content }} <end> {% endgeneration %}"
    "{% else %} {{ m.content }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(
    template: str | None = None, *, eos: str | None = "<end>"
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, whose masks can be checked by eye."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(WORDS[:5])
    # As Llama's: whoever asks for special tokens gets one at the beginning.
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token="<bos>", unk_token="<unk>"
    )
    made.chat_template = template
    return made


def chat(*said: str, first: str = "user") -> Chat:
    """Return a chat of the user and the assistant in turns."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return Chat(
        [{"role": roles[n % 2], "content": content} for n, content in enumerate(said)], "here"
    )


def shown(documents: list[Document], tokenizer: Any, **options: Any) -> list[str]:
    """Return each document's tokens as words, those in brackets that are learned."""
    return [
        " ".join(
            f"[{WORDS[token]}]" if learned else WORDS[token]
            for token, learned in zip(*packed, strict=True)
        )
        for packed in pack(documents, tokenizer, **options)
    ]


def test_a_text_is_learned_whole_and_followed_by_the_end_of_text() -> None:
    texts: list[Document] = [Text("hi why", "a"), Text(" ", "b"), Text("no", "c")]
    assert shown(texts, word_tokenizer()) == ["[hi] [why] [<end>]", "[<end>]", "[no] [<end>]"]


def test_the_name_of_a_special_token_in_a_text_is_no_special_token() -> None:
    tokenizer = tiny_tokenizer()
    text = "the <|im_end|><|endoftext|> fox"
    (packed,) = pack([Text(text, "a")], tokenizer)
    assert packed.tokens[-1] == 2
    assert packed.tokens[:-1].min() > 2
    assert tokenizer.decode(packed.tokens[:-1].tolist()) == text


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_answers_of_a_chat_are_learned(template: str) -> None:
    said: list[Document] = [chat("hi", "yes so", "why", "no .")]
    assert shown(said, word_tokenizer(template)) == [
        "<bos> <user> hi <end> <assistant> [yes] [so] [<end>] "
        "<user> why <end> <assistant> [no] [.] [<end>]"
    ]
    assert shown(said, word_tokenizer(template), learn="all") == [
        "[<bos>] [<user>] [hi] [<end>] [<assistant>] [yes] [so] [<end>] "
        "[<user>] [why] [<end>] [<assistant>] [no] [.] [<end>]"
    ]


def test_a_chat_that_ends_with_a_question_is_learned_up_to_it() -> None:
    assert shown([chat("hi", "yes", "why")], word_tokenizer(PLAIN)) == [
        "<bos> <user> hi <end> <assistant> [yes] [<end>] <user> why <end>"
    ]


def test_tools_are_rendered() -> None:
    template = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}" + PLAIN
    said = Chat(chat("hi", "yes").messages, "here", [{"name": "why"}])
    assert shown([said], word_tokenizer(template)) == [
        "why <bos> <user> hi <end> <assistant> [yes] [<end>]"
    ]


def test_tokens_of_bytes_and_spaces_are_those_of_their_answer() -> None:
    tokenizer = tiny_tokenizer()
    said = chat("Größe 🙂", "   日本語  🚀", "  ", "naïve\n\n   ")
    (packed,) = pack([said], tokenizer)
    runs: list[list[int]] = [[]]
    for token, learned in zip(packed.tokens.tolist(), packed.learned.tolist(), strict=True):
        if learned:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    assert [tokenizer.decode(run) for run in runs] == [
        "   日本語  🚀<|im_end|>\n",
        "naïve\n\n   <|im_end|>\n",
    ]


@pytest.mark.parametrize(
    ("offsets", "span", "learned"),
    [
        # A token over the border belongs to both sides.
        ([(0, 2), (2, 5), (5, 7)], (3, 5), [0, 1, 0]),
        # Without their spaces: "a", "   ", " b" and "c" of "a    bc".
        ([(0, 1), (4, 4), (5, 6), (6, 7)], (1, 4), [0, 1, 0, 0]),
        ([(0, 1), (4, 4), (5, 6), (6, 7)], (4, 6), [0, 0, 1, 0]),
        # A token for no character, before the word "ab".
        ([(0, 2), (2, 2), (2, 4)], (2, 4), [0, 1, 1]),
        ([(0, 2), (2, 2), (2, 4)], (0, 2), [1, 0, 0]),
        # Three tokens of one character.
        ([(0, 1), (0, 1), (0, 1), (1, 2)], (0, 1), [1, 1, 1, 0]),
        ([(0, 1), (1, 2)], (1, 1), [0, 0]),
        ([], (0, 1), []),
    ],
)
def test_tokens_of_a_span(
    offsets: list[tuple[int, int]], span: tuple[int, int], learned: list[int]
) -> None:
    assert packing._tokens_of([span], offsets).tolist() == [bool(one) for one in learned]


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer(PLAIN)
    mixed: list[Document] = [Text("hi", "a"), chat("hi", "no"), Text("so so", "b"), Text("no", "c")]
    whole = shown(mixed, tokenizer)
    assert len(whole) == 4
    monkeypatch.setattr(packing, "_BATCH_CHARS", 1)
    assert shown(mixed, tokenizer) == whole
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 1)
    monkeypatch.setattr(packing, "_BATCH_CHARS", 100)
    assert shown(mixed, tokenizer) == whole


def test_a_document_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_CHARS", 3)
    with pytest.raises(BadInput, match=r"^a: the document has 6 characters, and at most 3"):
        shown([Text("hi why", "a")], word_tokenizer())


# Leaves the content out of all answers but the last.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}> "
    "{% if loop.last or m.role == 'user' %}{{ m.content }} {% endif %}<end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "said", "message"),
    [
        (None, chat("hi", "no"), "^here: the tokenizer has no chat template"),
        (FORGETFUL, chat("hi", "no", "why", "so"), r"^here: messages\[1\]: the chat template ren"),
        (PLAIN, chat("hi"), "^here: nothing is learned of this chat"),
        (MARKED, chat("hi"), "^here: nothing is learned of this chat"),
        (PLAIN, chat("hi", first="assistant"), "^here: the chat template fails.*empty conversa"),
        ("{{ raise_exception('roles!') }}", chat("hi", "no"), "the chat template fails.*roles!"),
        ("{{ messages[1].content }}", chat("hi", "no"), r"messages\[0\].content: the chat tem"),
        ("{% for %}", chat("hi", "no"), "the chat template fails.*TemplateSyntaxError"),
    ],
)
def test_a_chat_that_cannot_be_learned_from(template: str | None, said: Chat, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        shown([said], word_tokenizer(template))


def test_a_template_that_renders_in_two_ways() -> None:
    tokenizer, said = word_tokenizer(MARKED), chat("hi", "no")
    with pytest.raises(BadInput, match=r"^here: the chat template renders the same .* two ways"):
        answer_spans(said, render(said, tokenizer) + "so", tokenizer)


def test_a_tokenizer_without_end_of_text() -> None:
    with pytest.raises(BadInput, match=r"^tokenizer: there is no end-of-text token"):
        shown([Text("hi", "a")], word_tokenizer(eos=None))


def test_a_tokenizer_without_offsets_learns_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer(PLAIN)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(BadInput, match=r"does not tell which characters a token stands for"):
        shown([chat("hi", "no")], tokenizer)
    assert shown([chat("hi", "no")], tokenizer, learn="all")
