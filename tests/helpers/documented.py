"""What the pages of docs/ promise, read from them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from moesaic.cluster.reports import page as reports_page
from tests.helpers.paths import ROOT

COMMANDS = ROOT / "docs" / "command-line.md"
RUNNING = ROOT / "docs" / "running.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (moesaic .*)$", re.MULTILINE)
_INLINE = re.compile(r"`(moesaic [^`]+)`")
_NAME = re.compile(r"`([^`]+)`")


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading, without its head."""
    _, _, behind = page.read_text().partition(f"\n## {heading}\n")
    assert behind, f"{page}: no heading {heading!r}"
    lines = [line for line in behind.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return _NAME.findall(cell)


def json_keys() -> dict[str, set[str]]:
    """Command -> the keys of what it prints with --json."""
    table = [
        (command, keys.partition(";")[0])
        for commands, _, keys in rows(COMMANDS, "JSON")
        for command in names(commands)
        if not command.startswith("--")
    ]
    found = {command: set(names(keys)) for command, keys in table}
    reports = {
        command: set(report.model_fields) for command, (report, _) in reports_page.COMMANDS.items()
    }
    assert not found.keys() & reports.keys()
    return found | reports


def section(heading: str) -> dict[str, list[str]]:
    """Language -> the blocks of a section of docs/running.md."""
    _, _, behind = RUNNING.read_text().partition(f"\n## {heading}\n")
    assert behind, f"no heading {heading!r}"
    found: dict[str, list[str]] = {}
    for language, text in _BLOCK.findall(behind.partition("\n## ")[0]):
        found.setdefault(language, []).append(text)
    return found


def blocks(kind: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for language, text in _BLOCK.findall(page.read_text()):
            if language == kind:
                yield page.name, text


def written_commands() -> list[tuple[str, str]]:
    """(page, command) of lines, of blocks, and in the middle of sentences."""
    found = []
    for page in PAGES:
        text = page.read_text()
        # What it does stands behind two spaces.
        found += [(page.name, line.partition("  ")[0]) for line in _INDENTED.findall(text)]
        found += [(page.name, line) for line in _INLINE.findall(text)]
    for page, text in blocks("sh"):
        found += [(page, line[line.index("moesaic ") :]) for line in text.splitlines()]
    return list(dict.fromkeys(found))
