"""A program in place of `actors/runtime/ray_head.py` whose Ray does not start.

It leaves what Ray leaves: a folder with a log, and a process that is named by it and has a child.
Its words are in the environment: the log, and "hang" if it is to wait for its end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

CHILD = [sys.executable, "-c", "import time; time.sleep(600)"]
PARENT = """
import subprocess, sys, time
print(subprocess.Popen(sys.argv[2:]).pid, flush=True)
time.sleep(600)
"""
LOG, HANGS, STARTED = "FAILING_HEAD_LOG", "FAILING_HEAD_HANGS", "FAILING_HEAD_STARTED"


def main(temp_dir: Path) -> None:
    folder = temp_dir / f"session_2026-01-01_00-00-00_{os.getpid():06}_{os.getpid()}"
    (folder / "logs").mkdir(parents=True)
    (temp_dir / "session_latest").unlink(missing_ok=True)
    (temp_dir / "session_latest").symlink_to(folder)
    if text := os.environ[LOG]:
        (folder / "logs" / "raylet.err").write_text(text)
    command = [sys.executable, "-c", PARENT, f"--session-dir={folder}", *CHILD]
    raylet = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert raylet.stdout is not None
    child = int(raylet.stdout.readline())
    with Path(os.environ[STARTED]).open("a") as started:
        started.write(f"{raylet.pid}\n{child}\n")
    if os.environ.get(HANGS):
        time.sleep(600)
    sys.exit("The current node timed out during startup.")


if __name__ == "__main__":
    main(Path(json.loads(sys.argv[1])["temp_dir"]))
