"""What ends a model's text, where its files name different tokens."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AddedToken, GenerationConfig, MixtralConfig, PreTrainedTokenizerFast

from moesaic.actors.engine.end_of_text import end_of_text
from tests.helpers.models.tiny import tiny_tokenizer

NAMES = [
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
    *("<|user|>", "<|assistant|>", "<eos>", "<bos>", "<think>", "</think>"),
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls %}<tool>{{ c.function.name }}</tool>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
# In the manner of gpt-oss: thinking and answer are messages of their own, and only the last
# answer of all ends with <|return|>.
CHANNELS = (
    "{% for m in messages %}"
    "{% if m.role != 'assistant' %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    "{% elif m.tool_calls %}"
    "{% if m.thinking or m.content %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking or m.content }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary"
    "<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% endif %}{% endfor %}"
)
# In the manner of GLM's: an answer ends where the user's turn begins.
HEADERS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"


def tokenizer_of(template: str | None, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES])
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = tokenizer_of(None)
ID = TOKENIZER.get_vocab()


def ends(
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    generation: Any = None,
    config: Any = None,
    size: int = 340,
) -> list[int]:
    named = MixtralConfig(vocab_size=size, eos_token_id=config)
    made = GenerationConfig(eos_token_id=generation)
    return end_of_text(named, made, None if tokenizer is None else lambda: tokenizer)


def test_the_union_of_all_that_name_one() -> None:
    assert ends(TOKENIZER, generation=[7, 8], config=9) == [7, 8, 9, ID["<eos>"]]
    assert ends(None, generation=7, config=[7, 9]) == [7, 9]
    assert ends(TOKENIZER) == [ID["<eos>"]]
    assert ends(tokenizer_of(None, eos=None)) == []
    assert end_of_text(MixtralConfig(vocab_size=340, eos_token_id=5), None, None) == [5]


@pytest.mark.parametrize("token_id", [-1, 340, 5000])
def test_ids_that_the_model_does_not_have_are_said(
    token_id: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert ends(None, generation=[token_id, 7]) == [7]
    assert f"generation_config.json names token {token_id}" in caplog.text


def test_a_default_that_nobody_wrote_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Mixtral's configuration has 2 where the file says nothing."""
    assert MixtralConfig().eos_token_id == 2
    assert ends(TOKENIZER, config=2) == [2, ID["<eos>"]]  # special there
    vocabulary = {letter: number for number, letter in enumerate("abcdef")}
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), eos_token="<eos>"
    )
    assert ends(plain, config=2) == [6]
    assert "token 2 is left out" in caplog.text
    assert "'c'" in caplog.text
    assert ends(plain, config=3) == [3, 6]  # somebody wrote that


def test_a_tokenizer_that_cannot_be_loaded_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> Any:
        raise OSError("no tokenizer.json")

    config = MixtralConfig(vocab_size=340, eos_token_id=7)
    assert end_of_text(config, None, load) == [7]
    assert "no tokenizer.json" in caplog.text


# ---- what a template writes behind an answer ----------------------------------------------------


@pytest.mark.parametrize(
    ("template", "named", "added"),
    [
        (CHATML, ["<eos>"], ["<|im_end|>"]),
        ("{{ '<bos>' }}" + CHATML, ["<eos>", "<bos>"], ["<|im_end|>"]),
        (CHATML, ["<|im_end|>"], []),
        (CHATML, ["<eos>", "<|im_end|>"], []),
        (CHATML.replace("<|im_end|>", "<eos>"), ["<eos>"], []),
        (CHATML.replace("<|im_end|>", " <|im_end|>"), ["<eos>"], ["<|im_end|>"]),
        (CHATML.replace("<|im_end|>", ""), ["<eos>"], ["<|im_start|>"]),
        (HEADERS, ["<eos>"], ["<|user|>"]),
        (HEADERS, ["<eos>", "<|user|>"], []),
        (CHANNELS, ["<|return|>", "<|call|>"], []),
        (CHANNELS, ["<eos>"], ["<|return|>"]),
        # Templates that write <|end|> behind the last answer, too: it also ends the thinking.
        (CHANNELS.replace("<|return|>", "<|end|>"), ["<eos>"], []),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ["<eos>"], []),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", ["<eos>"], []),
        ("{{ raise_exception('never') }}", ["<eos>"], []),
        ("{{ messages[0].content }}", ["<eos>"], []),
        ("{% if x %", ["<eos>"], []),
    ],
)
def test_the_templates_turn_end(template: str, named: list[str], added: list[str]) -> None:
    tokenizer = tokenizer_of(template, eos=None)
    found = ends(tokenizer, generation=[ID[name] for name in named])
    assert sorted(found) == sorted(ID[name] for name in (*named, *added))


def test_named_templates(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tokenizer = tokenizer_of(None)
    templates: Any = {"default": CHATML, "rag": HEADERS}
    tokenizer.chat_template = templates
    assert ends(tokenizer) == sorted([ID["<eos>"], ID["<|im_end|>"]])
    del templates["default"]
    assert ends(tokenizer) == [ID["<eos>"]]
    assert "does not render" in caplog.text
