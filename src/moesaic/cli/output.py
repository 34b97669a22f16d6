"""What commands print for programs."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_json(values: Any) -> None:
    json.dump(values, sys.stdout, indent=2)
    print()
