"""Who is at the other side of a Unix socket."""

from __future__ import annotations

import os
import socket
import struct


def same_user(sock: socket.socket) -> bool:
    """Return whether the process at the other side belongs to this process's user."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid == os.getuid()
