"""What a preflight finds in models: their folders, tokenizers, templates and paths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.actors.preflight.findings import raise_errors
from moesaic.actors.preflight.preflight import preflight
from moesaic.models.folder.tokenizer import read_tokenizer
from moesaic.proto.errors import CheckpointError, UnsupportedModel
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.preflight_specs import (
    TEMPLATE,
    TOKENIZER,
    found,
    only,
    remove,
    spec_of,
    without,
)
from tests.helpers.models.tiny import tiny_tokenizer


def _write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def _change(name: str, **values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(
            json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values)
        )

    return change


def _lost(name: str) -> Callable[[Path], Any]:
    """A link into a cache whose blob is gone."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../blobs/gone")

    return change


def _folder(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
EMPTY = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-config": (remove("config.json"), "no config.json"),
    "config": (_write("config.json", "{"), "config.json"),
    "architecture": (_write("config.json", '{"model_type": "llama"}'), "experts"),
    "no-weights": (remove("model.safetensors"), "neither model.safetensors nor"),
    "truncated": (_write("model.safetensors", "12345678{"), "damaged or truncated"),
    "no-tokenizer": (remove(*TOKENIZER), "no tokenizer: there is no tokenizer.json"),
    "tokenizer": (_write("tokenizer.json", '{"version": '), "the tokenizer cannot be read: "),
    "tokenizer-of-nothing": (_write("tokenizer.json", "{}"), "the tokenizer cannot be read: "),
    "template": (_write(TEMPLATE, "{% if %}"), "Expected an expression"),
    "template-refuses": (_write(TEMPLATE, "{{ raise_exception('no users') }}"), "no users"),
    "template-fails": (
        _write(TEMPLATE, "{{ messages[7].content + 1 }}"),
        "the chat template fails on a single user message",
    ),
    "template-says-nothing": (_write(TEMPLATE, "<s>"), "leaves out the text of a message"),
    **{f"lost-{file}": (_lost(file), "which does not exist; download") for file in FILES},
    **{f"folder-{file}": (_folder(file), f"{file}: not a file") for file in FILES},
    **{f"null-{file}": (_write(file, "null"), file) for file in FILES[:3]},
    **{f"lfs-{file}": (_write(file, LFS), "a pointer of Git LFS") for file in FILES[2:4]},
    "tokenizer-panics": (
        _change("tokenizer.json", normalizer=PANICS),
        "the tokenizer cannot be read: PanicException",
    ),
    "tokenizer-fails": (
        _change("tokenizer_config.json", model_max_length="x"),
        "the tokenizer fails on 'Hello': TypeError",
    ),
    "tokenizer-of-no-words": (
        _change("tokenizer.json", post_processor=EMPTY),
        "the tokenizer makes no token of 'Hello'",
    ),
    "padding": (_change("config.json", pad_token_id=10**6), "Padding_idx must be within"),
    "activation": (_change("config.json", hidden_act="nope"), "hidden_act: 'nope' is not known"),
    "architectures": (_change("config.json", architectures=3), "architectures: 3 is not a list"),
    "quantization": (_change("config.json", quantization_config="fp8"), "'fp8' is not a mapping"),
    "no-expert": (_change("config.json", num_experts_per_tok=0), "0 experts per token"),
    "more-experts": (_change("config.json", num_experts_per_tok=5), "a number from 1 to 4"),
    "end-of-text": (
        _change("generation_config.json", eos_token_id=[2, "x"]),
        "eos_token_id: [2, 'x'] is neither",
    ),
    "nested": (_write("generation_config.json", "[" * 200_000), "RecursionError"),
    "generation": (_write("generation_config.json", "[1"), "generation_config.json: cannot be"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_an_error(what: str, folder: Path) -> None:
    change, words = BROKEN[what]
    change(folder)
    one = only(spec_of(folder))
    assert (one.severity, one.path) == ("error", "models.0.path")
    assert words in one.message
    assert "\n" not in one.message
    with pytest.raises((CheckpointError, UnsupportedModel), match=r"models\.0\.path: "):
        raise_errors([one])


@pytest.mark.parametrize("tensor", ["model.norm.weight", "lm_head.weight"])
def test_a_tensor_of_the_trunk_that_is_missing_is_named(tensor: str, folder: Path) -> None:
    without(tensor)(folder)
    assert tensor in only(spec_of(folder)).message


@pytest.mark.parametrize("architecture", ["qwen3_moe", "olmoe", "dbrx", "switch_transformers"])
def test_tokenizers_that_transformers_makes_of_nothing(architecture: str, tmp_path: Path) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer: there is no tokenizer\.json"):
        read_tokenizer(tmp_path)


def test_without_an_endpoint_nobody_needs_a_tokenizer(folder: Path) -> None:
    remove(*TOKENIZER)(folder)
    assert found(spec_of(folder, endpoint=None)) == []


def test_a_model_without_a_template_completes(folder: Path) -> None:
    remove(TEMPLATE)(folder)
    one = only(spec_of(folder))
    assert (one.severity, one.path) == ("warning", "models.0.path")
    assert "/v1/completions works" in one.message


def test_tokens_without_an_embedding(folder: Path, tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    one = only(spec_of(folder))
    assert one.severity == "warning"
    assert "'<pad>' (320)" in one.message
    tiny_model("mixtral").save_pretrained(tmp_path / "small")  # has 96
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    one = only(spec_of(tmp_path / "small"))
    assert one.severity == "error"
    assert "and 221 more; the tokenizer is another model's" in one.message


@pytest.mark.parametrize("path", ["nowhere", "./nowhere/at-all", "/nowhere/at-all", "a/b/c"])
def test_a_path_to_nothing(path: str) -> None:
    one = only(spec_of(path))
    assert (one.severity, one.path) == ("error", "models.0.path")
    assert one.message.startswith(f"{path!r} is neither a folder, a hub id")


def test_a_path_to_a_file(whole: Path) -> None:
    one = only(spec_of(whole / "config.json"))
    assert one.message.endswith("is a file; give the folder that holds the model's files")


def test_numbers_of_experts_that_the_model_does_not_have(whole: Path) -> None:
    wanted = {"experts_per_token": 3, "min_experts_per_token": 3}
    keys = ["models.0.experts_per_token", "models.0.min_experts_per_token"]
    checked = preflight(spec_of(whole, model=wanted))
    assert [one.path for one in checked.findings] == keys
    assert checked.findings[0].message == "3, but 'm' has 2 experts per token; set at most 2"
