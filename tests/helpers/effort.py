"""How much is tried where more can always be tried: examples of a property, seeds of a simulator.

`make test` tries a quarter, `make test-all` everything (MOESAIC_TESTS=all). The latter also runs
clusters of texts and faults a second time with lent experts (MOESAIC_TEST_LENDING=always).
"""

from __future__ import annotations

import math
import os

LENDING = os.environ.get("MOESAIC_TEST_LENDING", "never")
ALL = os.environ.get("MOESAIC_TESTS") == "all"


def tries(count: int) -> int:
    return count if ALL else math.ceil(count / 4)
