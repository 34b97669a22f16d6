"""The page in a real browser: Debian's chromium, driven by npm's playwright-core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.with_browser.browser import Browser, lacking


@pytest.fixture(scope="session")
def is_installed() -> None:
    """Skip what needs a browser where there is none."""
    why = lacking()
    if why is not None:
        pytest.skip(why)


@pytest.fixture(scope="module")
def browser(is_installed: None) -> Iterator[Browser]:
    made = Browser()
    try:
        yield made
    finally:
        made.close()
