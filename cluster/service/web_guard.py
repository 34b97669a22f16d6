"""Which pages of a browser may send requests to an HTTP server: judged by their Host and Origin.

A browser on this machine reaches what listens on loopback, and carries out what any page asks of
it. A page whose name was made to resolve to 127.0.0.1 (DNS rebinding) is found out by its Host
header, a page of another site that sends a request (CSRF) by its Origin.
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
    """The host in a Host header (`name`, `name:port`, `[address]:port`), in small letters and
    without brackets; None where it is no such thing."""
    return _host(_AUTHORITY.fullmatch(authority.lower()))


def _origin_host(origin: str) -> str | None:
    """The same of an http or https Origin, and None of any other."""
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
    """Whether ``value`` is a name, or an address with or without brackets, and has no port."""
    try:
        ipaddress.ip_address(_plain(value))
    except ValueError:
        return ":" not in value and host_of(value) is not None
    return True


def is_loopback(host: str) -> bool:
    """Whether a host, as an address with or without brackets or as a name, is always this machine:
    `localhost`, 127.0.0.0/8 and ::1."""
    plain = _plain(host)
    try:
        return ipaddress.ip_address(plain).is_loopback
    except ValueError:
        return plain == "localhost"


def _plain(host: str) -> str:
    """A host as `host_of` words it."""
    plain = host.removeprefix("[").removesuffix("]").lower()
    try:
        return str(ipaddress.ip_address(plain))
    except ValueError:
        return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class WebGuard:
    """The rule of one server. Without ``loopback`` and without ``hosts`` there is none."""

    loopback: bool  # it listens there, and nowhere else
    hosts: frozenset[str] = frozenset()  # by which it may be asked for, beside loopback's names
    origins: frozenset[str] = frozenset()  # whose pages may send requests; `*`: all

    @classmethod
    def of(
        cls,
        listens: str,
        *,
        allowed_hosts: Collection[str] = (),
        origins: Collection[str] = (),
        own: Collection[str] = (),
    ) -> WebGuard:
        """``listens``: the address of the server. ``own``: further names that it is told to be
        reached by."""
        hosts = {*allowed_hosts, *(own if allowed_hosts else ())}
        return cls(
            loopback=is_loopback(listens),
            hosts=frozenset(map(_plain, hosts)),
            origins=frozenset(origins),
        )

    def check(self, hosts: Sequence[str], origins: Sequence[str]) -> None:
        """Raises Forbidden. ``hosts`` and ``origins``: all headers of these names of a request."""
        if not self.loopback and not self.hosts:
            return
        host = host_of(hosts[0]) if len(hosts) == 1 else None
        if "*" not in self.hosts and not self._known(host):
            said = ", ".join(hosts) or "none"
            raise Forbidden(
                f"Host: {said[:100]!r} is not a name of this server; `endpoint.allowed_hosts` of "
                "the cluster's spec allows more"
            )
        if self.loopback and origins:
            self._check_origin(origins, host)

    def _known(self, host: str | None) -> bool:
        return host is not None and (is_loopback(host) or host in self.hosts)

    def _check_origin(self, origins: Sequence[str], host: str | None) -> None:
        if "*" in self.origins or (len(origins) == 1 and origins[0] in self.origins):
            return
        site = _origin_host(origins[0]) if len(origins) == 1 else None
        # Sites have no ports: a page of this machine, or of the name by which this was asked for.
        if site is None or not (is_loopback(site) or site == host):
            raise Forbidden(
                f"Origin: {', '.join(origins)[:100]!r} is another site; `endpoint.cors_origins` of "
                "the cluster's spec allows pages to send requests"
            )
