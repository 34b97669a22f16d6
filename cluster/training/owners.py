"""Which hosts own what is trained.

An owner stays where it is as long as its host stays: its state is three to four times as large as
the weights. So owners move when hosts leave, and not when experts do; and if all owners of a key
are in one domain, which fails as a whole, and there is another one again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..expert_keys import SHARED, ExpertKey, is_shared

Owners = Mapping[ExpertKey, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerHosts:
    """The hosts that may own something, and what decides between them."""

    domains: Mapping[str, str]  # host -> what fails with it, of those that stay
    holders: Callable[[ExpertKey], Collection[str]]  # the hosts that serve an expert


@dataclass(slots=True)
class _Dealing:
    hosts: OwnerHosts
    owned_bytes: dict[str, int] = field(default_factory=dict)

    def kept(self, owners: Iterable[str], copies: int) -> list[str]:
        """Return the owners of a key that stay what they are, the first one among them."""
        domains = self.hosts.domains
        staying = [host for host in owners if host in domains]
        # One of each domain first; the others as far as there are not enough domains.
        firsts = {domains[host]: host for host in reversed(staying)}.values()
        others = [host for host in staying if host not in firsts]
        spread = min(copies, len(set(domains.values())))
        room = copies - max(spread, len(firsts))
        chosen = {*sorted(firsts, key=staying.index)[:copies], *others[: max(room, 0)]}
        return [host for host in staying if host in chosen]

    def next_owner(self, key: ExpertKey, chosen: Collection[str]) -> str | None:
        """Return one more owner for a key, or None if there is no other host.

        One in another domain comes first, then one that serves the expert, as its gradients and new
        weights need not travel; then the one that owns least.
        """
        domains, holders = self.hosts.domains, self.hosts.holders(key)
        taken = {domains[host] for host in chosen}

        def order(host: str) -> tuple[bool, bool, int, str]:
            return domains[host] in taken, host not in holders, self.owned_bytes[host], host

        return min((host for host in domains if host not in chosen), key=order, default=None)


def deal_owners(
    sizes_bytes: Mapping[ExpertKey, int],
    hosts: OwnerHosts,
    *,
    copies: int,
    before: Owners | None = None,
) -> dict[ExpertKey, tuple[str, ...]]:
    """Return ``copies`` owners of each key, or as many as there are hosts, the first one first.

    Owners in ``before`` whose hosts stay are kept, if they are in as many domains as possible. What
    the experts of a layer share is not dealt: all owners of these experts own it. The result
    depends on the arguments alone.
    """
    shared = [key for key in sizes_bytes if is_shared(key)]
    sizes_bytes = {key: size for key, size in sizes_bytes.items() if not is_shared(key)}
    dealing = _Dealing(hosts, dict.fromkeys(hosts.domains, 0))
    kept = {key: dealing.kept((before or {}).get(key, ()), copies) for key in sizes_bytes}
    for key, chosen in kept.items():
        for host in chosen:
            dealing.owned_bytes[host] += sizes_bytes[key]
    # The largest first, so that the rest evens out what they leave uneven.
    for key in sorted(sizes_bytes, key=lambda key: (-sizes_bytes[key], key)):
        chosen = kept[key]
        while len(chosen) < copies:
            found = dealing.next_owner(key, chosen)
            if found is None:
                break
            chosen.append(found)
            dealing.owned_bytes[found] += sizes_bytes[key]
    dealt = {key: tuple(chosen) for key, chosen in kept.items()}
    return dealt | owners_of_shared(shared, dealt, before or {})


def owners_of_shared(
    keys: Iterable[ExpertKey], owners: Owners, before: Owners
) -> dict[ExpertKey, tuple[str, ...]]:
    """Return the hosts that own some expert of a layer, for the keys of what its experts share.

    Each expert's next version has a copy of it, which a host can make then without asking another
    one. Those that owned it ``before`` come first: they have its state.
    """
    of_layer: dict[ExpertKey, set[str]] = {key: set() for key in keys}
    if not of_layer:
        return {}
    for expert, hosts in owners.items():
        shared = expert._replace(expert=SHARED)
        if shared in of_layer and expert != shared:
            of_layer[shared].update(hosts)
    return {
        key: tuple(dict.fromkeys([*(h for h in before.get(key, ()) if h in hosts), *sorted(hosts)]))
        for key, hosts in of_layer.items()
    }


def keys_by_host(owners: Owners) -> dict[str, list[ExpertKey]]:
    """Return what each host owns."""
    found: dict[str, list[ExpertKey]] = {}
    for key, hosts in owners.items():
        for host in hosts:
            found.setdefault(host, []).append(key)
    return found


def without_hosts(owners: Owners, gone: Collection[str]) -> dict[ExpertKey, tuple[str, ...]]:
    """Return the owners that are left when hosts are gone."""
    return {key: tuple(h for h in hosts if h not in gone) for key, hosts in owners.items()}


def ownerless(owners: Owners) -> list[ExpertKey]:
    """Return the keys that have lost all their owners."""
    return [key for key, hosts in owners.items() if not hosts]


def first_owners(owners: Owners, keys: Iterable[ExpertKey]) -> dict[ExpertKey, str]:
    """Return the first owner of each of ``keys`` that is owned."""
    return {key: owners[key][0] for key in keys if owners.get(key)}
