"""Documents from files, and what is said of files that have none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moesaic.models.data.sources import Chat, Format, Source, Text, documents, listing
from moesaic.proto.errors import BadInput

HELLO = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"})


def texts(source: Source) -> list[str]:
    found = list(documents(source))
    assert all(isinstance(document, Text) for document in found)
    return [document.text for document in found if isinstance(document, Text)]


def jsonl(folder: Path, *records: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return file


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfGr\xc3\xb6\xc3\x9fe\r\n")
    assert list(documents(Source(file))) == [Text("Größe\r\n", str(file))]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.md", "a/b/c.txt", "a.md", ".git/x.md", "c/.x.md", "empty.md"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("" if name == "empty.md" else name)
    assert texts(Source(tmp_path)) == ["a.md", "a/b/c.txt", "a/z.md", "b.md"]
    assert texts(Source(tmp_path, pattern="**/*.txt")) == ["a/b/c.txt"]
    assert texts(Source(tmp_path, pattern="*/*.md")) == [".git/x.md", "a/z.md", "c/.x.md"]


def test_lines_of_texts(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"text": "a", "id": 1}, {"text": ""}, {"text": "b\n", "messages": None})
    file.write_text(file.read_text().replace("\n", "\n\n \n"))
    assert list(documents(Source(file))) == [
        Text("a", f"{file}, line 1"),
        Text("b\n", f"{file}, line 7"),
    ]


def test_lines_of_chats(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    tools = [{"name": "f"}]
    file = jsonl(tmp_path, {"messages": HELLO}, {"messages": [*HELLO, call], "tools": tools})
    bare = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    assert list(documents(Source(file))) == [
        Chat(HELLO, f"{file}, line 1"),
        Chat((*HELLO, bare), f"{file}, line 2", tuple(tools)),
    ]


def test_a_folder_of_lines(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert texts(Source(tmp_path)) == ["a", "b"]
    assert listing(Source(tmp_path))[0] == "jsonl"
    (tmp_path / "c.txt").write_text("c")
    with pytest.raises(BadInput, match=r"has JSONL \(a.jsonl\) and other files \(c.txt\); give a"):
        texts(Source(tmp_path))
    assert texts(Source(tmp_path, pattern="*.txt")) == ["c"]


class Saved:
    """A dataset as the library opens it."""

    def __init__(self, **columns: list[Any]) -> None:
        self._columns = columns
        self.column_names = list(columns)

    def select_columns(self, names: list[str]) -> Saved:
        return Saved(**{name: self._columns[name] for name in names})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in zip(*self._columns.values(), strict=True):
            yield dict(zip(self._columns, row, strict=True))


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put a library in place of `datasets`, which opens ``tmp_path`` as what "opened" is here."""
    found: dict[str, Any] = {}
    library = ModuleType("datasets")
    vars(library).update(DatasetDict=dict, load_from_disk=lambda path: found[path])
    monkeypatch.setitem(sys.modules, "datasets", library)
    (tmp_path / "state.json").write_text("{}")
    return found


def test_a_saved_dataset(tmp_path: Path, saved: dict[str, Any]) -> None:
    place = str(tmp_path)
    saved[place] = Saved(id=[1, 2], text=["a", "b"])
    assert list(documents(Source(tmp_path))) == [
        Text("a", f"{place}, row 0"),
        Text("b", f"{place}, row 1"),
    ]
    filled = [message | {"name": None} for message in HELLO]
    saved[place] = {"train": Saved(messages=[filled], tools=[None])}
    assert list(documents(Source(tmp_path))) == [Chat(HELLO, f"{place}, row 0")]


def test_a_saved_dataset_that_cannot_be_read(tmp_path: Path, saved: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"the dataset cannot be read: .*; save it again"):
        texts(Source(tmp_path))
    saved[str(tmp_path)] = {"train": Saved(text=["a"]), "test": Saved(text=["b"])}
    with pytest.raises(BadInput, match=r"has the splits train, test; give the folder of one"):
        texts(Source(tmp_path))
    saved[str(tmp_path)] = Saved(prompt=["a"])
    with pytest.raises(BadInput, match=r"row 0: has no field text or messages"):
        texts(Source(tmp_path))
    with pytest.raises(BadInput, match=r"pattern is '\*', and a dataset is read whole"):
        texts(Source(tmp_path, "dataset", "*"))


def test_a_saved_dataset_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(BadInput, match=r"needs the package datasets; install it .pip install dat"):
        texts(Source(tmp_path))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[" * 100_000, "not JSON: .*recursion"),
        ("[]", "has to be an object with a field text or messages, not \\[\\]"),
        ('{"id": 1}', "has no field text or messages"),
        ('{"text": "a", "messages": []}', "has both fields, text and messages"),
        ('{"text": 1}', "text has to be a string, not a number"),
        ('{"text": "a\\ud800"}', r"text has half of a surrogate pair, \\ud800"),
        ('{"messages": []}', r"messages has to be a list of at least one message, not \[\]"),
        ('{"messages": "hi"}', "messages has to be a list .* not a string"),
        ('{"messages": ["hi"]}', r"messages\[0\] has to be an object with role and content"),
        ('{"messages": [{"content": "a"}]}', r"messages\[0\].role has to be a string, not null"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\].content has to be a string, not nul"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            r"messages\[0\].content has to be a string, not a list",
        ),
        (
            '{"messages": [{"role": "user", "content": "\\udfff"}]}',
            r"messages\[0\] has half of a surrogate pair, \\udfff",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}], "tools": {"a": 1}}',
            "tools has to be a list of objects, not an object",
        ),
    ],
)
def test_a_line_that_is_no_document(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f"\n{line}\n")
    with pytest.raises(BadInput, match=rf"^{file}, line 2: {said}"):
        list(documents(Source(file)))


def test_texts_and_chats_are_not_mixed(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"text": "a"}, {"messages": HELLO})
    with pytest.raises(BadInput, match=r"line 2: has the field messages, and records before it ha"):
        list(documents(Source(file)))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    for name, begin in (("a.txt", b""), ("b.txt", b"\xef\xbb\xbf")):
        file = tmp_path / name
        file.write_bytes(begin + b"Gr\xf6\xdfe")
        with pytest.raises(BadInput, match=rf"^{file}: byte {len(begin) + 2} \(0xf6\) is not UTF"):
            texts(Source(file))
    file = tmp_path / "c.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "\xf6"}\n')
    with pytest.raises(BadInput, match=rf"^{file}: byte 24 \(0xf6\) is not UTF-8"):
        texts(Source(file))


@pytest.mark.parametrize(
    ("name", "form", "pattern", "said"),
    [
        ("none", "auto", None, "does not exist"),
        ("a.txt", "auto", "*.txt", "pattern is '.*', and this is a file"),
        ("empty", "auto", None, "the folder has no files"),
        ("folder", "auto", "*.x", r"the folder has no file that the pattern '\*\.x' picks"),
        ("folder", "auto", "/tmp/*", "its files cannot be listed with the pattern '/tmp/.*'"),
        ("folder", "auto", "", "its files cannot be listed with the pattern ''"),
        ("folder", "dataset", None, "format is dataset, and there is no state.json"),
        ("x.json", "auto", None, "the format is not clear from the name; set format to text"),
        ("blank.txt", "auto", None, "there is no document in it; every text is empty"),
        ("a.txt", "jsonl", None, "not JSON"),
    ],
)
def test_a_source_without_documents(
    tmp_path: Path, name: str, form: Format, pattern: str | None, said: str
) -> None:
    for folder in ("empty", "folder"):
        (tmp_path / folder).mkdir()
    for file in ("a.txt", "folder/b.txt", "x.json"):
        (tmp_path / file).write_text("{")
    (tmp_path / "blank.txt").touch()
    with pytest.raises(BadInput, match=rf"^{tmp_path / name}.*: {said}"):
        list(documents(Source(tmp_path / name, form, pattern)))


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}')

    def refused(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    # As root, who runs the tests in containers, may read everything.
    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "read_bytes", refused)
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(BadInput, match=rf"{name}: cannot be read: .*Permission denied"):
            texts(Source(tmp_path / name))
