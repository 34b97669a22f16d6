"""The page in a real browser: Debian's chromium, driven by npm's playwright-core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.with_browser.browser import Browser, lacking


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    why = lacking()
    if why is not None:
        pytest.skip(why)
    made = Browser()
    try:
        yield made
    finally:
        made.close()
