"""What the pages of docs/ promise, read from them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = ROOT / "docs" / "command-line.md"
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
    """Command -> the keys of what it prints with --json, whatever the cluster."""
    table = [
        (command, keys.partition(";")[0])
        for commands, _, keys in rows(COMMANDS, "JSON")
        for command in names(commands)
        if not command.startswith("--")
    ]
    found = {command: set(names(keys)) for command, keys in table}
    for command, keys in table:
        if keys.startswith("those of"):
            base, *more = names(keys)
            found[command] = found[base] | set(more)
    return found
