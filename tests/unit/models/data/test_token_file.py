"""The file of tokens: read at any place, whole or not there, and packed once."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moesaic.models.data.made_from import made_from
from moesaic.models.data.packing import Packed
from moesaic.models.data.sequences import count_sequences, count_targets, sequence
from moesaic.models.data.sources import Source
from moesaic.models.data.token_file import TokenFile, is_current, write_token_file
from moesaic.proto.errors import BadInput, CheckpointError
from tests.helpers.effort import tries
from tests.helpers.models.tiny import tiny_mixtral, tiny_tokenizer

ABOUT = {"files": [["a", 1, 2]], "learn": "all"}
DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=20), min_size=1
).filter(any)


def packed(*documents: list[tuple[int, bool]]) -> Iterator[Packed]:
    for document in documents:
        yield Packed(
            np.array([token for token, _ in document], dtype=np.int32),
            np.array([learned for _, learned in document], dtype=np.bool_),
        )


def counting(tokens: int) -> Iterator[Packed]:
    """Return one document, whose tokens are 0, 1, ..., and every third is not learned."""
    return packed([(token, token % 3 > 0) for token in range(tokens)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.safetensors"


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


@settings(max_examples=tries(100))
@given(DOCUMENTS, st.data())
def test_what_is_written_is_read_at_any_place(
    documents: list[list[tuple[int, bool]]], data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "tokens.safetensors")
        write_token_file(path, packed(*documents), about=ABOUT)
        written = [pair for document in documents for pair in document]
        start = data.draw(st.integers(0, len(written)))
        count = data.draw(st.integers(0, len(written) - start))
        with TokenFile(path) as opened:
            assert (len(opened), opened.documents) == (len(written), len(documents))
            tokens, learned = opened.read(start, count)
            for begin, number in ((0, len(written) + 1), (-1, 1), (0, -1)):
                with pytest.raises(BadInput, match=rf"has {len(written)} tokens, and {number} fr"):
                    opened.read(begin, number)
        assert (tokens.dtype, learned.dtype) == (torch.int64, torch.bool)
        part = written[start : start + count]
        assert list(zip(tokens.tolist(), learned.tolist(), strict=True)) == part
        assert list(Path(folder).iterdir()) == [path]
        # Any reader of safetensors can read it.
        assert load_file(path)["tokens"].tolist() == [token for token, _ in written]


def test_a_closed_file_is_not_mapped(path: Path) -> None:
    write_token_file(path, counting(5), about=ABOUT)
    with TokenFile(path):
        assert mappings(path) == 1
    assert mappings(path) == 0
    assert is_current(path, ABOUT)
    assert mappings(path) == 0


def test_a_file_is_current_while_it_was_made_from_the_same(path: Path) -> None:
    assert not is_current(path, ABOUT)
    write_token_file(path, counting(5), about=ABOUT)
    assert is_current(path, dict(reversed(ABOUT.items())))
    assert not is_current(path, ABOUT | {"learn": "answers"})
    write_token_file(path, counting(7), about=ABOUT | {"learn": "answers"})
    assert is_current(path, ABOUT | {"learn": "answers"})
    with TokenFile(path) as opened:
        assert len(opened) == 7


def test_another_version_is_packed_again_and_not_read(path: Path) -> None:
    write_token_file(path, counting(5), about=ABOUT)
    header = b'"moesaic_token_file":"1"'
    assert header in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(header, header.replace(b"1", b"7")))
    assert not is_current(path, ABOUT)
    with pytest.raises(BadInput, match=r"a token file of version 7, and this Moesaic reads versi"):
        TokenFile(path)


def test_a_file_that_cannot_be_finished_leaves_the_one_before(path: Path) -> None:
    write_token_file(path, counting(5), about=ABOUT)

    def failing() -> Iterator[Packed]:
        yield from counting(9)
        raise BadInput("line 7")

    with pytest.raises(BadInput, match=r"line 7"):
        write_token_file(path, failing(), about=ABOUT)
    with pytest.raises(BadInput, match=r"there are no tokens to write"):
        write_token_file(path, iter([]), about=ABOUT)
    assert list(path.parent.iterdir()) == [path]
    with TokenFile(path) as opened:
        assert len(opened) == 5


def test_a_draft_of_a_killed_process_is_removed_and_one_of_a_living_is_not(path: Path) -> None:
    killed, living = (path.with_name(f".{path.name}.{name}.draft") for name in ("0a", "0b"))
    killed.touch()
    with living.open("xb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        write_token_file(path, counting(5), about=ABOUT)
    assert sorted(path.parent.iterdir()) == [living, path]


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "text"])
def test_a_damaged_file_is_neither_read_nor_current(path: Path, damage: str) -> None:
    write_token_file(path, counting(500), about=ABOUT)
    octets = path.read_bytes()
    forms = {"cut": octets[:-1], "longer": octets + b"0", "empty": b"", "text": b"a,b,c\n" * 9}
    path.write_bytes(forms[damage])
    for opening in (lambda: TokenFile(path), lambda: is_current(path, ABOUT)):
        with pytest.raises(CheckpointError, match=f"^{path}: damaged or truncated, or no token"):
            opening()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"tokens": "6"}, "its tensors are"), ({"tokens": "x"}, "x"), ({"documents": None}, "docum")],
)
def test_a_header_that_does_not_fit_its_tensors(
    path: Path, change: dict[str, Any], said: str
) -> None:
    write_token_file(path, counting(5), about=ABOUT)
    octets = path.read_bytes()
    begin, end = 8, 8 + int.from_bytes(octets[:8], "little")
    header = json.loads(octets[begin:end])
    given = header["__metadata__"] | change
    header["__metadata__"] = {name: value for name, value in given.items() if value is not None}
    text = json.dumps(header).encode().ljust(end - begin)
    path.write_bytes(octets[:begin] + text + octets[end:])
    with pytest.raises(CheckpointError, match=f"^{path}: damaged: .*{said}"):
        TokenFile(path)


def test_files_of_others_are_not_taken_for_it(path: Path) -> None:
    with pytest.raises(BadInput, match=f"^{path}: does not exist; pack documents"):
        TokenFile(path)
    save_file({"tokens": torch.zeros(3)}, path)
    for opening in (lambda: TokenFile(path), lambda: is_current(path, ABOUT)):
        with pytest.raises(BadInput, match=f"^{path}: a safetensors file, but none of tokens"):
            opening()


def test_sequences_are_windows_without_the_tail(path: Path) -> None:
    write_token_file(path, counting(11), about=ABOUT)
    with TokenFile(path) as opened:
        assert count_sequences(opened, 4) == 2
        ids, labels = sequence(opened, 1, 4)
        assert (ids.dtype, labels.dtype) == (torch.int64, torch.int64)
        assert (ids.tolist(), labels.tolist()) == ([4, 5, 6, 7], [4, 5, -100, 7])
        assert count_targets(labels) == 2
        with pytest.raises(BadInput, match=r"has 11 tokens, fewer than one sequence of 12; give m"):
            count_sequences(opened, 12)
        with pytest.raises(BadInput, match=r"^sequence_length: has to be at least 2, not 1"):
            count_sequences(opened, 1)
        with pytest.raises(BadInput, match=r"has 11 tokens, and 4 from 8 on are not among them"):
            sequence(opened, 2, 4)


def test_targets_are_those_of_transformers(path: Path) -> None:
    """A model's loss is the mean over as many targets as are counted."""
    write_token_file(path, counting(12), about=ABOUT)
    with TokenFile(path) as opened:
        ids, labels = sequence(opened, 0, 12)
    with torch.no_grad():
        out = tiny_mixtral()(input_ids=ids[None], labels=labels[None])
    each = torch.nn.functional.cross_entropy(
        out.logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum"
    )
    assert out.loss.item() == pytest.approx(each.item() / count_targets(labels), rel=1e-5)


def test_tokens_are_made_from_files_and_a_tokenizer(tmp_path: Path) -> None:
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    file = data / "a.txt"
    file.write_text("the quick fox")
    tiny_tokenizer().save_pretrained(model)
    source = Source(data)
    first = made_from(source, model, "all")
    assert json.loads(json.dumps(first)) == first
    assert first == made_from(Source(data, "text"), model, "all")
    assert first != made_from(source, model, "answers")
    data.rename(tmp_path / "moved")
    assert first == made_from(Source(tmp_path / "moved"), model, "all")
    (tmp_path / "moved").rename(data)

    modified = file.stat().st_mtime_ns
    os.utime(file, ns=(modified, modified + 1))
    assert first != made_from(source, model, "all")
    os.utime(file, ns=(modified, modified))
    assert first == made_from(source, model, "all")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert first["tokenizer"] != made_from(source, model, "all")["tokenizer"]
