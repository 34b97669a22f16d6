"""Building the demo model in a process of its own.

It takes 2.8 GB, which Python and torch do not return to the system, and the process that serves the
model lives for long. Run as a program, this module is that process. It reports its progress and its
error as lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from tempfile import TemporaryFile
from typing import IO, Any

from ...proto.errors import CheckpointError, MoesaicError, describe_error, from_wire

LOOK_S = 0.5
END_S = 5.0

# (name of the step, done, total)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """The arguments for `upcycle`."""

    gguf: str
    out: str
    experts: int
    top_k: int
    noise: float
    tokens: int
    dtype: str


def build_apart(build: Build, progress: Progress | None = None) -> None:
    """Run `upcycle` with the demo's texts in a process of its own.

    ``progress`` is called twice a second, also without progress; an exception of its ends the
    process. Raises the errors of `upcycle`, and CheckpointError if the process was killed; the
    caller then has to remove the incomplete model.
    """
    reader, writer = os.pipe()
    command = [sys.executable, "-m", __name__, json.dumps(asdict(build)), str(writer)]
    with TemporaryFile() as said, os.fdopen(reader, "rb", buffering=0) as told:
        with _process(command, writer, said) as process:
            failed = _follow(told, progress)
            code = process.wait()
        if failed is not None:
            raise failed
        if code:
            raise CheckpointError(f"the demo model was not made: {_ending(code, said)}")


@contextmanager
def _process(command: list[str], writer: int, said: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Run the process in a session of its own, and end it with the block.

    Ctrl-C then reaches it only through this process.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            pass_fds=[writer],
            start_new_session=True,
        )
    finally:
        os.close(writer)
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(END_S)


def _follow(told: IO[bytes], progress: Progress | None) -> MoesaicError | None:
    """Pass the progress on until the process closes its end; return its error."""
    report = progress or (lambda *_: None)
    failed, step, rest = None, None, b""
    while True:
        if not select.select([told], [], [], LOOK_S)[0]:
            if step is not None:
                report(*step)
            continue
        if not (more := told.read(1 << 16)):
            return failed
        *lines, rest = (rest + more).split(b"\n")
        for line in lines:
            match json.loads(line):
                case {"code": code, "error": text}:
                    failed = from_wire(code, text)
                case [what, done, total]:
                    step = (what, done, total)
                    report(*step)


def _ending(code: int, said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    last = f"; it said: {lines[-1]}" if lines else ""
    if code == -signal.SIGKILL:
        return f"its process was killed, as the system does where memory runs out{last}"
    return f"its process ended with {code}{last}"


def main(arguments: str, writer: int) -> int:
    """Build the model; ``arguments`` is a `Build` as JSON."""
    from .demo import demo_texts
    from .upcycle import upcycle

    build = Build(**json.loads(arguments))
    with os.fdopen(writer, "w", buffering=1) as lines:

        def tell(line: Any) -> None:
            lines.write(json.dumps(line) + "\n")

        try:
            upcycle(
                build.gguf,
                build.out,
                experts=build.experts,
                top_k=build.top_k,
                noise=build.noise,
                gate="kmeans",
                texts=demo_texts(),
                tokens=build.tokens,
                dtype=build.dtype,
                progress=lambda *step: tell(step),
            )
        except MoesaicError as error:
            tell({"code": error.code, "error": str(error)})
            return 1
        except BrokenPipeError:
            return 1  # the caller is gone
        except Exception as error:
            # Whatever it is, the caller is told, and it is raised again.
            tell(
                {
                    "code": CheckpointError.__name__,
                    "error": f"the demo model: {describe_error(error)}",
                }
            )
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
