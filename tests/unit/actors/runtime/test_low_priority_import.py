"""Imports at a low priority."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moesaic.actors.runtime.low_priority_import import NICER, import_at_low_priority

PRIORITY_OF_ITS_THREAD = """
import gc, os, threading
collects = gc.isenabled()
priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_the_import_has_a_low_priority_and_the_rest_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_quietly.py").write_text(PRIORITY_OF_ITS_THREAD)
    monkeypatch.syspath_prepend(tmp_path)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    import_at_low_priority("imported_quietly")
    imported = sys.modules.pop("imported_quietly")
    assert imported.priority == min(before + NICER, 19)
    assert (imported.collects, gc.isenabled()) == (False, True)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_an_import_that_fails_says_so() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_at_low_priority("no_such_module")


def test_ray_does_not_import_torch_with_the_actor_of_a_host() -> None:
    """It would do so at the usual priority."""
    code = "import sys, moesaic.actors.host.host_actor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
