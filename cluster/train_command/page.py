"""Write the spec of `moesaic train`, key by key: `make spec` makes docs/train-spec.md."""

from __future__ import annotations

import sys

from ..spec.page import key_tables
from .train_spec import TrainSpec

_HEAD = """\
# The spec of a training run

What `moesaic train` takes ([how](train.md)). It is checked as a whole before anything starts:
unknown keys and impossible values are errors that name the key's path. This page is generated from
the code by `make spec`.
"""


def train_spec_page() -> str:
    """Return the whole page."""
    return "\n".join([_HEAD, *key_tables(TrainSpec)])


if __name__ == "__main__":
    sys.stdout.write(train_spec_page())
