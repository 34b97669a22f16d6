"""Texts of three domains that every machine with Python has: code, documentation, licences."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

DOMAINS = ("code", "documentation", "licences")
# Characters of a domain that are learned from and held out, and the most of one document. A token
# has about 3.5.
LEARNED, HELD_OUT, DOCUMENT = 700_000, 80_000, 40_000
_LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")


def write_texts(folder: Path) -> dict[str, str]:
    """Write what is learned from to files in a folder; return what is held out of each domain.

    No document is in both, and none is there twice.
    """
    held_out: dict[str, str] = {}
    for domain in DOMAINS:
        documents = sorted({text[:DOCUMENT] for text in _documents(domain) if text.strip()})
        random.Random(domain).shuffle(documents)
        held_out[domain] = "\n\n".join(_taken(documents, HELD_OUT))
        learned = list(_taken(documents, LEARNED))
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(learned):
            (folder / domain / f"{number:04}.txt").write_text(text)
    return held_out


def _taken(documents: list[str], characters: int) -> Iterator[str]:
    """Take documents from the end of a list until there are so many characters."""
    while documents and characters > 0:
        text = documents.pop()
        characters -= len(text)
        yield text


def _documents(domain: str) -> Iterator[str]:
    if domain == "code":
        for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
            yield path.read_text(errors="replace")
        return
    for package in distributions():
        if domain == "documentation":
            payload = package.metadata.get_payload()  # pyright: ignore[reportAttributeAccessIssue]
            yield str(payload or package.metadata.get("Description", ""))
            continue
        for file in package.files or ():
            if file.name.upper().startswith(_LICENCES) and not file.name.endswith(".py"):
                path = Path(str(file.locate()))
                if path.is_file():
                    yield path.read_text(errors="replace")
