"""Documents to train on: read from text files, from JSONL, or from what `datasets` saved.

A document is a text or a chat. Files are UTF-8, and whatever cannot be read is a BadInput that
names the file, the line and the field.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...proto.errors import BadInput

Format = Literal["auto", "text", "jsonl", "dataset"]
Message = Mapping[str, Any]

_JSONL = (".jsonl", ".ndjson")
# Text too, but hardly meant as such.
_UNCLEAR = (".json", ".csv", ".tsv")
_FIELDS = ("text", "messages")
# The files in which `save_to_disk` describes one dataset, and several splits.
_DATASET_FILE, _SPLITS_FILE = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class Source:
    """Where documents are.

    ``path``: a file, or a folder. ``format``: "text" (each file is one document), "jsonl" (each
    line is an object with a field ``text`` or ``messages``), "dataset" (a folder of
    `Dataset.save_to_disk`, with a column of such a name), or "auto", which finds it out from names.
    ``pattern`` picks the files of a folder, such as ``**/*.md``; without it these are all files,
    and below them, except those whose name or folder begins with a dot.
    """

    path: Path
    format: Format = "auto"
    pattern: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A text, and its file and line for messages of errors."""

    text: str
    place: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and its file and line for messages of errors.

    Each message has a ``role`` and a ``content``; one that has ``tool_calls`` may lack the content.
    What is null is left out. ``tools`` are those that the model was offered, as JSON schemas.
    """

    messages: Sequence[Message]
    place: str
    tools: Sequence[Mapping[str, Any]] = ()


Document = Text | Chat


def documents(source: Source) -> Iterator[Document]:
    """Read the documents of ``source`` in a fixed order: of names, and of lines.

    Empty texts and blank lines of JSONL are left out. Raises BadInput, while it goes along, for
    what cannot be read, and at the end if there was no document.
    """
    kind, files = listing(source)
    if kind == "dataset":
        found = _records(_rows(source.path))
    elif kind == "jsonl":
        found = _records(record for file in files for record in _lines(file))
    else:
        found = (Text(_decoded(_read(file), file), str(file)) for file in files)
    empty = True
    for document in found:
        if isinstance(document, Chat) or document.text:
            empty = False
            yield document
    if empty:
        raise BadInput(f"{source.path}: there is no document in it; every text is empty")


def listing(source: Source) -> tuple[Format, list[Path]]:
    """Return the format of ``source``, which is not "auto", and its files in order.

    Raises BadInput if it does not exist, has no files, or has a format that is not clear.
    """
    path = source.path
    if not path.exists():
        raise BadInput(f"{path}: does not exist; path has to name a file or a folder")
    if source.pattern is not None and not path.is_dir():
        raise BadInput(
            f"{path}: pattern is {source.pattern!r}, and this is a file; a pattern picks the files "
            "of a folder"
        )
    saved = path.is_dir() and any((path / name).is_file() for name in (_DATASET_FILE, _SPLITS_FILE))
    kind = source.format
    if kind == "auto" and saved and source.pattern is None:
        kind = "dataset"
    if kind == "dataset" and not saved:
        raise BadInput(
            f"{path}: format is dataset, and there is no {_DATASET_FILE}; give a folder that "
            "Dataset.save_to_disk has written, or another format"
        )
    if kind == "dataset" and source.pattern is not None:
        raise BadInput(
            f"{path}: pattern is {source.pattern!r}, and a dataset is read whole; leave it out"
        )
    files = _files(path, source.pattern)
    return (_format(path, files) if kind == "auto" else kind), files


def _files(path: Path, pattern: str | None) -> list[Path]:
    if not path.is_dir():
        return [path]
    wanted = "**/*" if pattern is None else pattern
    try:
        found = [file for file in path.glob(wanted) if file.is_file()]
    except (ValueError, NotImplementedError, OSError) as error:
        raise BadInput(
            f"{path}: its files cannot be listed with the pattern {wanted!r}: {error}; a pattern "
            "is relative, such as **/*.md"
        ) from error
    if pattern is None:
        found = [
            file
            for file in found
            if not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
    if not found:
        what = "no files" if pattern is None else f"no file that the pattern {pattern!r} picks"
        raise BadInput(f"{path}: the folder has {what}; give another path or pattern")
    return sorted(found, key=Path.as_posix)


def _format(path: Path, files: Sequence[Path]) -> Format:
    """Find out the format from the files' names."""
    lines = [file for file in files if file.suffix.lower() in _JSONL]
    if len(lines) == len(files):
        return "jsonl"
    if lines:
        other = next(file for file in files if file not in lines)
        raise BadInput(
            f"{path}: has JSONL ({lines[0].name}) and other files ({other.name}); give a format, "
            "and a pattern that picks the files"
        )
    for file in files:
        if file.suffix.lower() in _UNCLEAR:
            raise BadInput(
                f"{file}: the format is not clear from the name; set format to text, or to jsonl, "
                "if each line is an object"
            )
    return "text"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error}") from error


def _decoded(octets: bytes, file: Path, start: int = 0) -> str:
    """Decode ``octets``, which stand in ``file`` from byte ``start`` on."""
    mark = len(codecs.BOM_UTF8) if not start and octets.startswith(codecs.BOM_UTF8) else 0
    try:
        return octets[mark:].decode()
    except UnicodeDecodeError as error:
        at = start + mark + error.start
        raise BadInput(
            f"{file}: byte {at} (0x{octets[mark + error.start]:02x}) is not UTF-8; convert the "
            "file to UTF-8, or leave it out with a pattern"
        ) from error


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each line of JSONL."""
    start = 0
    try:
        with file.open("rb") as opened:
            for number, octets in enumerate(opened, 1):
                place = f"{file}, line {number}"
                line = _decoded(octets, file, start)
                start += len(octets)
                if line.strip():
                    yield place, _parsed(line, place)
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error}") from error


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"{place}: not JSON: {error}; each line has to be one object with a field text or "
            "messages"
        ) from error


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the columns of each row of a saved dataset."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadInput(
            f"{path}: reading a saved dataset needs the package datasets; install it "
            "(pip install datasets), or save the dataset as JSONL (Dataset.to_json)"
        ) from error
    try:
        opened: Any = datasets.load_from_disk(str(path))
    except Exception as error:
        # Damaged files fail in whatever way the reader of each of them does.
        raise BadInput(
            f"{path}: the dataset cannot be read: {error}; save it again with Dataset.save_to_disk"
        ) from error
    if isinstance(opened, datasets.DatasetDict):
        if len(opened) != 1:
            raise BadInput(
                f"{path}: has the splits {', '.join(opened)}; give the folder of one of them"
            )
        opened = next(iter(opened.values()))
    wanted = [name for name in (*_FIELDS, "tools") if name in opened.column_names]
    for number, row in enumerate(opened.select_columns(wanted) if wanted else opened):
        yield f"{path}, row {number}", row


def _records(records: Iterator[tuple[str, Any]]) -> Iterator[Document]:
    """Check records, all of which have to have the field that the first one has."""
    first: str | None = None
    for place, record in records:
        if not isinstance(record, dict):
            raise BadInput(
                f"{place}: has to be an object with a field text or messages, not {_named(record)}"
            )
        given = [name for name in _FIELDS if record.get(name) is not None]
        if len(given) != 1:
            raise BadInput(
                f"{place}: has "
                + ("both fields, text and messages" if given else "no field text or messages")
                + "; give one of them in each record"
            )
        first = first or given[0]
        if given[0] != first:
            raise BadInput(
                f"{place}: has the field {given[0]}, and records before it have {first}; keep "
                "texts and chats in sources of their own"
            )
        yield _text(record, place) if first == "text" else _chat(record, place)


def _text(record: Mapping[str, Any], place: str) -> Text:
    text = record["text"]
    if not isinstance(text, str):
        raise BadInput(f"{place}: text has to be a string, not {_named(text)}")
    _check_characters(text, f"{place}: text")
    return Text(text, place)


def _chat(record: Mapping[str, Any], place: str) -> Chat:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadInput(
            f"{place}: messages has to be a list of at least one message, not {_named(messages)}"
        )
    checked = tuple(
        _message(message, f"{place}: messages[{number}]") for number, message in enumerate(messages)
    )
    tools = record.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadInput(f"{place}: tools has to be a list of objects, not {_named(tools)}")
    _check_characters(json.dumps(tools, ensure_ascii=False), f"{place}: tools")
    return Chat(checked, place, tuple(tools))


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise BadInput(f"{place} has to be an object with role and content, not {_named(message)}")
    # In a dataset every message has the fields of all others.
    given = {name: value for name, value in message.items() if value is not None}
    if not isinstance(given.get("role"), str):
        raise BadInput(f"{place}.role has to be a string, not {_named(given.get('role'))}")
    content = given.get("content")
    if not isinstance(content, str) and not (content is None and given.get("tool_calls")):
        raise BadInput(f"{place}.content has to be a string, not {_named(content)}")
    _check_characters(json.dumps(given, ensure_ascii=False), place)
    return given


def _check_characters(text: str, place: str) -> None:
    """Refuse surrogates, which JSON can spell and no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{place} has half of a surrogate pair, \\u{ord(text[error.start]):04x}, which is no "
            "character; remove it"
        ) from error


def _named(value: Any) -> str:
    """Return what kind of JSON a value is."""
    if value is None:
        return "null"
    if value == [] or value == {} or value == "":
        return json.dumps(value)
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return kinds.get(type(value), "a number")
