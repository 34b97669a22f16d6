"""No test here, and no library, speaks to anybody but the endpoint."""

from __future__ import annotations

import socket

import pytest


def test_other_machines_are_out_of_reach() -> None:
    with pytest.raises(PermissionError, match="only loopback is allowed"):
        socket.getaddrinfo("example.com", 443)
    with socket.socket() as one, pytest.raises(PermissionError, match="only loopback is allowed"):
        one.connect(("192.0.2.1", 443))
