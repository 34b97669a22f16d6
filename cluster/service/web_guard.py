"""Decide by Host and Origin headers which web pages may send requests to an HTTP server.

A browser on this machine can reach servers on loopback, and sends the requests of any page that is
open in it. The Host header exposes a page whose name resolves to 127.0.0.1 (DNS rebinding). The
Origin header exposes a page of another site that sends a request (CSRF).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...proto.errors import Forbidden

_NAME = r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?))"
_AUTHORITY = re.compile(rf"{_NAME}(?::\d{{1,5}})?", re.ASCII)
_ORIGIN = re.compile(rf"https?://{_NAME}(?::\d{{1,5}})?", re.ASCII)


def host_of(authority: str) -> str | None:
    """Return the host in a Host header, in lower case and without brackets; None if malformed.

    The header is `name`, `name:port` or `[address]:port`.
    """
    return _host(_AUTHORITY.fullmatch(authority.lower()))


def _origin_host(origin: str) -> str | None:
    """Return the host in an http or https Origin, as `host_of` does; None for any other."""
    return _host(_ORIGIN.fullmatch(origin.lower()))


def _host(found: re.Match[str] | None) -> str | None:
    if found is None:
        return None
    if found["v6"] is None:
        return found["name"]
    try:
        return str(ipaddress.IPv6Address(found["v6"]))
    except ValueError:
        return None


def is_host(value: str) -> bool:
    """Return whether ``value`` is a name, or an address with or without brackets, without port."""
    try:
        ipaddress.ip_address(_plain(value))
    except ValueError:
        return ":" not in value and host_of(value) is not None
    return True


def is_loopback(host: str) -> bool:
    """Return whether a host is always this machine: `localhost`, 127.0.0.0/8 or ::1.

    The host is a name, or an address with or without brackets.
    """
    plain = _plain(host)
    try:
        return ipaddress.ip_address(plain).is_loopback
    except ValueError:
        return plain == "localhost"


def _plain(host: str) -> str:
    """Return a host in the form of `host_of`."""
    plain = host.removeprefix("[").removesuffix("]").lower()
    try:
        return str(ipaddress.ip_address(plain))
    except ValueError:
        return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class WebGuard:
    """The rule of one server; without ``loopback`` and ``hosts`` everything may pass."""

    loopback: bool  # the server listens on loopback only
    hosts: frozenset[str] = frozenset()  # allowed in the Host header, besides loopback's names
    origins: frozenset[str] = frozenset()  # their pages may send requests; `*`: all

    @classmethod
    def of(
        cls,
        listens: str,
        *,
        allowed_hosts: Collection[str] = (),
        origins: Collection[str] = (),
        own: Collection[str] = (),
    ) -> WebGuard:
        """Make the rule of a server on the address ``listens``.

        ``own`` are names of the server itself, which are allowed besides ``allowed_hosts``.
        """
        hosts = {*allowed_hosts, *(own if allowed_hosts else ())}
        return cls(
            loopback=is_loopback(listens),
            hosts=frozenset(map(_plain, hosts)),
            origins=frozenset(origins),
        )

    def check(self, hosts: Sequence[str], origins: Sequence[str]) -> None:
        """Check all Host and all Origin headers of a request; raise Forbidden."""
        if not self.loopback and not self.hosts:
            return
        host = host_of(hosts[0]) if len(hosts) == 1 else None
        if "*" not in self.hosts and not self._known(host):
            said = ", ".join(hosts) or "none"
            raise Forbidden(
                f"Host: {said[:100]!r} is not a name of this server; add it to "
                "`endpoint.allowed_hosts` of the cluster's spec to allow it"
            )
        if self.loopback and origins:
            self._check_origin(origins, host)

    def _known(self, host: str | None) -> bool:
        return host is not None and (is_loopback(host) or host in self.hosts)

    def _check_origin(self, origins: Sequence[str], host: str | None) -> None:
        if "*" in self.origins or (len(origins) == 1 and origins[0] in self.origins):
            return
        site = _origin_host(origins[0]) if len(origins) == 1 else None
        # A site includes all ports of a host. Allowed are pages of this machine, and those of the
        # host that the request was sent to.
        if site is None or not (is_loopback(site) or site == host):
            raise Forbidden(
                f"Origin: {', '.join(origins)[:100]!r} is another site; add it to "
                "`endpoint.cors_origins` of the cluster's spec to allow its requests"
            )


def check_same_site(hosts: Sequence[str], origins: Sequence[str], fetched: Sequence[str]) -> None:
    """Check that a request that changes something comes from this server's own page, or from none.

    The arguments are all its Host, Origin and Sec-Fetch-Site headers. Raises Forbidden.
    """
    if any(site not in ("same-origin", "none") for site in fetched):
        raise Forbidden(
            f"Sec-Fetch-Site: {', '.join(fetched)[:100]!r} is another page; only this server's own "
            "page may do this"
        )
    if not origins:
        return
    own = {f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")} if hosts else set()
    if len(origins) != 1 or origins[0].lower() not in own:
        raise Forbidden(
            f"Origin: {', '.join(origins)[:100]!r} is another page; only this server's own page "
            "may do this"
        )
