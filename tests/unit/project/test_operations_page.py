"""The symptoms in docs/operations.md are what the code says."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from moesaic.cluster.reports.report import HostState
from tests.helpers.documented import names
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text()
_, _, SYMPTOMS = PAGE.partition("\n## Symptoms\n")
ROWS = re.findall(r"^\| (?!you see|---)(.+?) \|.*\|.*\|$", SYMPTOMS, re.MULTILINE)
CODE = ("actors", "cluster", "models", "proto", "src/moesaic")
# What a first cell names beside messages: paths, commands of others.
NO_MESSAGES = {"/readyz", "/livez", "/status", "helm upgrade"}


@cache
def texts() -> tuple[str, ...]:
    """Every string of the code, without the values that an f-string puts in."""
    found = list[str]()
    for room in CODE:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(" ".join(node.value.split()))
    return tuple(found)


MESSAGES = sorted({name for row in ROWS for name in names(row)} - NO_MESSAGES)


def test_the_page_has_symptoms() -> None:
    assert len(ROWS) > 30
    assert len(MESSAGES) > 25


@pytest.mark.parametrize("message", [m for m in MESSAGES if m not in set(HostState)])
def test_a_message_of_the_page_is_said_by_the_code(message: str) -> None:
    for part in message.split("..."):
        words = part.strip()
        assert not words or any(words in text for text in texts()), words
