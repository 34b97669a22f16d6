"""Chat templates of many families, in the form of the originals and shortened in what they tell the
model; and tokenizers that have them."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from moesaic.actors.text.chat_template import ChatTemplate
from tests.helpers.models.tiny import tiny_tokenizer

FOLDER = Path(__file__).parent / "chat_templates"
_BACKEND = tiny_tokenizer(chat=False).backend_tokenizer


def _families() -> dict[str, str | dict[str, str]]:
    """FAMILY.jinja, or FAMILY.NAME.jinja for each of several named ones."""
    found: dict[str, str | dict[str, str]] = {}
    for file in sorted(FOLDER.glob("*.jinja")):
        family, _, name = file.stem.partition(".")
        if not name:
            found[family] = file.read_text()
            continue
        named = found.setdefault(family, {})
        assert isinstance(named, dict)
        named[name] = file.read_text()
    return found


FAMILIES = _families()


def tokenizer_with(template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_BACKEND, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def chat_template(template: str | dict[str, str] | None) -> ChatTemplate:
    return ChatTemplate("m", tokenizer_with(template))


def family(name: str) -> ChatTemplate:
    return chat_template(FAMILIES[name])
