"""Ports that are chosen before somebody binds to them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moesaic.actors.runtime import ports


@pytest.fixture
def given_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the kernel says which ports it gives out by itself."""
    monkeypatch.setattr(ports, "_EPHEMERAL_PORTS", tmp_path / "range")
    return tmp_path / "range"


def test_a_free_port_is_none_that_the_kernel_gives_out(given_out: Path) -> None:
    given_out.write_text("32768\t60999\n")
    found = {ports.free_port("127.0.0.1") for _ in range(20)}
    assert all(1024 < port < 32768 for port in found)
    assert len(found) > 10


def test_where_the_kernel_gives_out_all_ports_it_chooses(given_out: Path) -> None:
    given_out.write_text("1024\t65535\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports.free_port("127.0.0.1")))
