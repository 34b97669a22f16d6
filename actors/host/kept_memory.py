"""A host's side of the memory keeper (`memory_keeper.py`)."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import sys
import threading

from ...proto.unix_peers import same_user
from .memory_keeper import MESSAGE_BYTES

log = logging.getLogger(__name__)

# How long a host waits for what its predecessor has left. A killed process with much memory takes
# some time to end.
_LEFT_S = 5.0
# Between two attempts to reach a keeper; each pause is twice as long as the one before.
_RETRY_S, _MOST_RETRY_S = 1.0, 60.0
_SEND_S = 1.0
_BACKLOG = 64
_KEEPER = "moesaic.actors.host.memory_keeper"


class KeptMemory:
    """The memory that one host has handed to its node's keeper, which it starts if there is none.

    A thread watches the keeper. If it dies, another one is started and gets the same memory.
    """

    def __init__(self, address: str, host: str, *, keep_s: float, parent_pid: int) -> None:
        """Connect to the keeper at an abstract Unix address.

        The memory of the process that was ``host`` before is in `left`: models, with descriptors
        that the caller owns now. The keeper ends with the process ``parent_pid``, and keeps memory
        for ``keep_s`` seconds after its host has died.
        """
        self._address = address
        self._host = host
        self._keep_s = keep_s
        self._parent_pid = parent_pid
        self._lock = threading.Lock()
        self._kept: dict[str, int] = {}  # {model: a descriptor of this object's}
        self._socket: socket.socket | None = None
        self._closed = threading.Event()
        self._retry_s = _RETRY_S
        self.left = self._join()
        self._thread = threading.Thread(target=self._watch, name=f"{host}-keeper", daemon=True)
        self._thread.start()

    def keep(self, model: str, descriptor: int) -> None:
        """Let the keeper have a model's memory; the descriptor stays the caller's."""
        with self._lock:
            before = self._kept.pop(model, None)
            if before is not None:
                os.close(before)
            self._kept[model] = os.dup(descriptor)
            self._hand_over(model)

    def forget(self, model: str) -> None:
        """Let the keeper free what it has of a model."""
        with self._lock:
            before = self._kept.pop(model, None)
            if before is not None:
                os.close(before)
            self._tell({"forget": model})

    def close(self) -> None:
        """Leave the keeper, which frees this host's memory now; it may be called twice."""
        with self._lock:
            self._closed.set()
            self._tell({"leave": True})
            self._hang_up()
            for descriptor in self._kept.values():
                os.close(descriptor)
            self._kept.clear()
        self._thread.join(_RETRY_S)

    # ---- the keeper -----------------------------------------------------------------------------

    def _join(self) -> list[tuple[str, int]]:
        """Connect, and return what a predecessor has left; the lock is held or not needed yet."""
        left: list[tuple[str, int]] = []
        try:
            self._socket = self._connect()
            self._say({"hello": self._host, "keep_s": float(self._keep_s)})
            answer = json.loads(self._socket.recv(MESSAGE_BYTES) or "{}")
            while len(left) < answer.get("left", 0):
                data, given, _, _ = socket.recv_fds(
                    self._socket, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
                )
                if not data or not given:
                    raise OSError(errno.EPIPE, "the keeper has ended")
                left += [(json.loads(data).get("model", ""), one) for one in given]
            self._socket.settimeout(_SEND_S)
            self._retry_s = _RETRY_S
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            log.log(
                logging.WARNING if self._retry_s == _RETRY_S else logging.DEBUG,
                "host %s: no memory keeper, so its experts would be loaded again after its death: "
                "%s",
                self._host,
                error,
                extra={"host": self._host},
            )
            self._disconnect()
        return left

    def _connect(self) -> socket.socket:
        """Return a connection to the keeper; start one if there is none. Raises OSError."""
        for _ in range(3):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(_LEFT_S)
            try:
                sock.connect(f"\0{self._address}")
                if not same_user(sock):
                    raise OSError(errno.EPERM, "another user's process listens at its address")
                return sock
            except ConnectionRefusedError:
                sock.close()
                self._start()
            except OSError:
                sock.close()
                raise
        raise OSError(errno.ECONNREFUSED, "it does not accept connections")

    def _start(self) -> None:
        """Start a keeper, unless another host of the node has been faster. Raises OSError."""
        # The kernel accepts connections before the keeper's process runs, so hosts need not wait.
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            try:
                listener.bind(f"\0{self._address}")
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return
                raise
            listener.listen(_BACKLOG)
            number = listener.fileno()
            command = [sys.executable, "-m", _KEEPER, str(number), str(self._parent_pid)]
            # The command forks the keeper and exits. Pipes of this process would stay open in it.
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[number],
                timeout=_LEFT_S,
                check=True,
            )

    def _hand_over(self, model: str) -> None:
        self._tell({"keep": model}, self._kept[model])

    def _tell(self, message: dict[str, object], *descriptors: int) -> None:
        """Send a message to the keeper, if there is one."""
        if self._socket is None:
            return
        try:
            self._say(message, *descriptors)
        except OSError as error:
            log.info("host %s: its memory keeper does not answer: %s", self._host, error)
            self._hang_up()  # the thread starts another

    def _hang_up(self) -> None:
        """Shut the connection down, so that the thread notices and closes it."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the other side may have ended it
                self._socket.shutdown(socket.SHUT_RDWR)

    def _say(self, message: dict[str, object], *descriptors: int) -> None:
        assert self._socket is not None
        data = json.dumps(message).encode()
        if descriptors:
            socket.send_fds(self._socket, [data], list(descriptors))
        else:
            self._socket.send(data)

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _watch(self) -> None:
        while not self._closed.is_set():
            sock = self._socket
            if sock is not None and _is_there(sock):
                continue
            with self._lock:
                self._disconnect()
                if self._closed.is_set():
                    return
                for model, descriptor in self._join():
                    os.close(descriptor)  # this process has it, or has loaded it by now
                    if model not in self._kept:
                        self._tell({"forget": model})
                for model in list(self._kept):
                    self._hand_over(model)
            if self._socket is None:
                self._closed.wait(self._retry_s)
                self._retry_s = min(2 * self._retry_s, _MOST_RETRY_S)


def _is_there(sock: socket.socket) -> bool:
    """Wait up to a send's time limit, and return whether the other side has not ended."""
    try:
        return bool(sock.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False
