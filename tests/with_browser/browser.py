"""A browser, driven by `driver.mjs` in a process of its own."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

# Where `make test-browser` installs what package.json names.
MODULES = ROOT / "build" / "browser" / "node_modules"
VARIABLE = "MOESAIC_BROWSER_MODULES"
ANSWER_S = 60.0


def lacking() -> str | None:
    """Return what is not installed, and how it is; None if everything is."""
    if shutil.which("node") is None:
        return "node is not installed"
    if shutil.which("chromium") is None:
        return "chromium is not installed (Debian's package chromium)"
    if not (modules() / "playwright-core").is_dir():
        return f"playwright-core is not in {modules()}; `make test-browser` installs it"
    return None


def modules() -> Path:
    return Path(os.environ.get(VARIABLE) or MODULES)


class Browser:
    """One page at a time. Every method raises AssertionError with the browser's words."""

    def __init__(self) -> None:
        driver = Path(__file__).with_name("driver.mjs")
        command = ["node", str(driver), str(modules()), shutil.which("chromium") or ""]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()

    def open(
        self,
        url: str,
        *,
        width: int = 1440,
        height: int = 900,
        scheme: str = "dark",
        motion: str = "no-preference",
    ) -> None:
        """Open the page in a new context, and wait until it is live."""
        self.do("open", url=url, width=width, height=height, scheme=scheme, motion=motion)
        self.wait("document.body.dataset.link === 'live' && window.moesaic.map.model !== null")

    def run(self, text: str) -> Any:
        """Return the value of an expression in the page."""
        return self.do("run", text=text)

    def wait(self, text: str, timeout_s: float = 20.0) -> None:
        """Wait until an expression is true."""
        self.do("wait", text=text, timeout=1000 * timeout_s)

    def do(self, what: str, **more: Any) -> Any:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        process.stdin.flush()
        assert select.select([process.stdout], [], [], ANSWER_S)[0], f"no answer to {what}"
        line = process.stdout.readline()
        assert line, f"the browser's driver has ended: {process.poll()}"
        answer = json.loads(line)
        assert "error" not in answer, f"{what} {more}: {answer.get('error')}"
        return answer["value"]
