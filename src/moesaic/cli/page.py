"""`moesaic page`: the page of a cluster, in the browser."""

from __future__ import annotations

import html
import time
import webbrowser
from typing import Annotated
from urllib.parse import quote

import typer

from ..private_files import remove_private, write_private
from ..proto.errors import ClusterError
from ..session import ClusterSession, need_session, session_dir

NameOption = Annotated[str, typer.Option("--name", help="Name of the cluster, as in its spec.")]

# A browser has read the file by then.
_OPENING_S = 5.0


def page(
    name: NameOption = "local",
    only_print: Annotated[
        bool,
        typer.Option("--print", help="Print the page's address with the key, and open nothing."),
    ] = False,
) -> None:
    """Open the page of a cluster in the browser, with the key that its actions need."""
    session = need_session(name)
    address = page_address(session)
    if only_print:
        print(address)
        return
    print(f"opening {session.monitoring}/ with the operator key")
    if not _open(session.name, address):
        raise ClusterError(
            "no browser can be opened here; `moesaic page --print` prints the address for one"
        )


def page_address(session: ClusterSession) -> str:
    """Return the page's address with the operator key, which browsers send to no server.

    Raises ClusterError if this machine cannot reach the page.
    """
    if session.monitoring is None:
        raise ClusterError(
            f"cluster {session.name!r} has no page that this machine can reach; it is at the "
            "address `monitoring` of the spec, if the spec has an endpoint"
        )
    key = "" if session.operator_key is None else f"#key={quote(session.operator_key, safe='')}"
    return f"{session.monitoring}/{key}"


def _open(name: str, address: str) -> bool:
    """Let a browser open the address by way of a private file.

    As an argument of the browser, the key would be open to all users of the machine.
    """
    file = session_dir() / f"{name}.page.html"
    target = html.escape(address, quote=True)
    write_private(
        file,
        f'<!doctype html><meta name="referrer" content="no-referrer">'
        f'<meta http-equiv="refresh" content="0; url={target}"><title>Moesaic</title>',
    )
    try:
        opened = webbrowser.open(file.as_uri())
        if opened:
            time.sleep(_OPENING_S)
        return opened
    finally:
        remove_private(file)
