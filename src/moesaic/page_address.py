"""The address of a cluster's page with the key that its actions need, and a browser there."""

from __future__ import annotations

import html
import time
import webbrowser
from urllib.parse import quote

from .private_files import remove_private, write_private
from .proto.errors import ClusterError
from .session import ClusterSession, session_dir

# A browser has read the file by then.
_OPENING_S = 5.0


def page_address(session: ClusterSession) -> str:
    """Return the page's address, with the operator key in the part that is sent to no server.

    Raises ClusterError if this machine cannot reach the page.
    """
    if session.monitoring is None:
        raise ClusterError(
            f"cluster {session.name!r} has no page that this machine can reach; it is at the "
            "address `monitoring` of the spec, if the spec has an endpoint"
        )
    key = "" if session.operator_key is None else f"#key={quote(session.operator_key, safe='')}"
    return f"{session.monitoring}/{key}"


def open_page(session: ClusterSession) -> None:
    """Let a browser open the page by way of a private file. Raises ClusterError if none can.

    As an argument of the browser, the key would be open to all users of the machine.
    """
    file = session_dir() / f"{session.name}.page.html"
    target = html.escape(page_address(session), quote=True)
    write_private(
        file,
        '<!doctype html><meta name="referrer" content="no-referrer">'
        f'<meta http-equiv="refresh" content="0; url={target}"><title>Moesaic</title>',
    )
    try:
        if not webbrowser.open(file.as_uri()):
            raise ClusterError(
                "no browser can be opened here; `moesaic page --print` prints the address for one"
            )
        time.sleep(_OPENING_S)
    finally:
        remove_private(file)
