"""Import transformers' models without what only compiling needs.

For processes of our own in which nothing is compiled: hosts, trunks, and commands that look at a
model. What is left out took 40 % of the CPU that a host's imports took, and 130 MB (measured). It
is imported when something asks for more of it than a mark.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_DYNAMO = "torch._dynamo"
# These mark functions for the compiler; a function without the mark computes the same.
_MARKS = ("allow_in_graph", "assume_constant_result", "disable")


def import_models() -> None:
    """Import transformers' models; does nothing in a process that has them or the compiler."""
    if _DYNAMO in sys.modules or "transformers.modeling_utils" in sys.modules:
        return
    import torch

    # Only losses of object detection use scipy. With None Python finds no module of this name, and
    # transformers works without.
    sys.modules["scipy"] = None  # pyright: ignore[reportArgumentType]
    sys.modules[_DYNAMO] = _Marks(Path(torch.__file__).parent / "_dynamo")
    try:
        import transformers.modeling_utils  # noqa: F401
    finally:
        del sys.modules["scipy"]


class _Marks(ModuleType):
    """Stands for torch's compiler, which is imported when more than a mark is asked of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_DYNAMO)
        self.__path__ = [str(folder)]  # so that its modules can be imported without it

    def __getattr__(self, name: str) -> Any:
        if name in _MARKS:
            return _mark
        if name.startswith("__"):
            raise AttributeError(name)  # Python itself asks modules for such names
        if sys.modules[_DYNAMO] is self:
            del sys.modules[_DYNAMO]
        return getattr(importlib.import_module(_DYNAMO), name)


def _mark(function: Any = None, *_: Any, **__: Any) -> Any:
    return _mark if function is None else function
