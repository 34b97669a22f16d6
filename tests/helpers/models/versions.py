"""Whether these tests run with an older transformers than the one that `make` installs."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
from packaging.version import Version

from tests.helpers.paths import ROOT

_PIN = re.search(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
assert _PIN is not None
OLDER_TRANSFORMERS = Version(version("transformers")) < Version(_PIN[1])
# For what only a newer transformers has.
newest_transformers = pytest.mark.skipif(OLDER_TRANSFORMERS, reason="needs a newer transformers")
