"""Print the lowest version of each dependency that pyproject.toml allows, as pip's constraints.

    python -m tests.helpers.lowest_pins > lowest.txt

torch is left out: which builds of it there are depends on the machine.
"""

from __future__ import annotations

import re
import tomllib

from tests.helpers.paths import ROOT

_RANGE = re.compile(r"([\w.-]+)(\[[\w,]+\])?>=([\w.]+)")


def lowest_pins() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [_RANGE.match(one) for one in project["dependencies"]]
    pins = {found[1]: found[3] for found in ranges if found is not None}
    assert len(pins) == len(ranges), "a dependency without a lowest version"
    del pins["torch"]
    return [f"{name}=={version}" for name, version in pins.items()]


if __name__ == "__main__":
    print("\n".join(lowest_pins()))
