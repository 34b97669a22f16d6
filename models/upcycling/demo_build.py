"""Making the demo model in a process that ends: it takes 2.8 GB, which Python and torch do not give
back to the system, and the process that serves the model lives for long.

Run as a program, this is that process. It tells its progress and its error as lines of JSON.
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

from ...proto.errors import CheckpointError, MoesaicError, from_wire, in_words

LOOK_S = 0.5
END_S = 5.0

# (what is being done, done, of how many)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What `upcycle` is asked for."""

    gguf: str
    out: str
    experts: int
    top_k: int
    noise: float
    tokens: int
    dtype: str


def build_apart(build: Build, progress: Progress | None = None) -> None:
    """`upcycle` with the demo's texts, in a process of its own.

    ``progress`` is called twice a second, also while there is none: what it raises ends the
    process. Raises what `upcycle` raises, and CheckpointError where the process was killed; what
    is half made is left to the caller then.
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
    """In a session of its own, so that Ctrl-C reaches it by way of this process alone. It does not
    outlive the block."""
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
    """Pass the progress on until the process has no more to tell; gives its error."""
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
    """The process itself; ``arguments``: a `Build` as JSON."""
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
            return 1  # who asked for it is gone
        except Exception as error:
            tell({"code": CheckpointError.__name__, "error": f"the demo model: {in_words(error)}"})
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
