"""How a command ends: its exit code, and what SIGINT and SIGTERM do to `moesaic up`.

The first signal asks for an end: it interrupts a start, and ends a wait. The second one ends the
process at once, whatever it is doing. A thread counts the signals, on the file descriptor that
Python writes them to, because the main thread may be inside a library for long, and because Ray
replaces the handler of SIGTERM whenever it is initialised.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self

DONE, FAILED, USAGE, INTERRUPTED, NOBODY_READS = 0, 1, 2, 130, 141

EXIT_CODES = {
    DONE: "done",
    FAILED: "failed; stderr says why in one line",
    USAGE: "wrong usage: an unknown command, option or value",
    INTERRUPTED: "ended by Ctrl-C",
    NOBODY_READS: "the reader of the output closed it",
}
EPILOG = "Exit codes: " + "; ".join(f"{code} {why}" for code, why in EXIT_CODES.items()) + "."

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ending at once may need remote calls to a Ray that the cluster does not own.
AT_ONCE_S = 20.0


class EndSignals:
    """A context manager for the main thread that counts signals to end."""

    def __init__(
        self,
        at_once: Callable[[], None],
        *,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """Set what the second signal does.

        It calls ``at_once`` in a thread of its own, which removes everything, and then ``leave``.
        """
        self._at_once = at_once
        self._leave = leave
        self.asked = threading.Event()
        self._interrupts = True
        self._handled = 0
        self._before = {one: signal.getsignal(one) for one in SIGNALS}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def __enter__(self) -> Self:
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._count, name="signals", daemon=True).start()
        self.arm()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for one, handler in self._before.items():
            signal.signal(one, handler)
        os.close(self._writer)

    def arm(self) -> None:
        """Install the handlers of SIGINT and SIGTERM.

        Call this again whenever Ray may have replaced one of the handlers.
        """
        for one in SIGNALS:
            signal.signal(one, self._on_signal)

    def check(self) -> None:
        """Raise KeyboardInterrupt if an end was asked for; call it between the steps of a start.

        What a handler raises is lost if the signal comes while Python runs a destructor.
        """
        if self._interrupts and self.asked.is_set():
            raise KeyboardInterrupt

    def only_ask(self) -> None:
        """Let the first signal set ``asked`` and interrupt nothing, from now on."""
        self._interrupts = False
        self.arm()

    def _on_signal(self, signum: int, frame: object) -> None:
        self._handled += 1
        if self._handled > 1:
            # The other thread is ending everything; nothing new may begin here meanwhile.
            time.sleep(2 * AT_ONCE_S)
        elif self._interrupts:
            raise KeyboardInterrupt

    def _count(self) -> None:
        with os.fdopen(self._reader, "rb", buffering=0) as reader:
            while byte := reader.read(1):
                if byte[0] not in SIGNALS:
                    continue
                if not self.asked.is_set():
                    self.asked.set()
                    continue
                ending = threading.Thread(target=self._at_once, name="at-once", daemon=True)
                ending.start()
                ending.join(AT_ONCE_S)
                self._leave(INTERRUPTED)
                return


def exit_with(code: int) -> NoReturn:
    """End a process that has done its work, with this exit code even if a signal comes now.

    Python takes seconds to end a process with large libraries. A signal would then replace the
    code, and near the end Python takes handlers away; signals that are ignored stay ignored.
    """
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    # Python looks through all objects for garbage before it ends: 1 s where torch and transformers
    # are loaded (measured).
    gc.freeze()
    sys.exit(code)
