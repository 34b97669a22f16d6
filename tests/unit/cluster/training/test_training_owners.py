"""Who owns what: least movement, balance, domains, and the same result for the same arguments."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import SHARED, ExpertKey
from moesaic.cluster.training.owners import (
    OwnerHosts,
    Owners,
    deal_owners,
    first_owners,
    keys_by_host,
    ownerless,
    without_hosts,
)

SHARED_KEYS = [ExpertKey("m", layer, SHARED) for layer in range(2)]
KEYS = [ExpertKey("m", layer, expert) for layer in range(3) for expert in range(4)]
sizes = st.dictionaries(st.sampled_from(KEYS), st.integers(1, 50), min_size=1)
# Host -> its domain.
pools = st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from("xyz"), max_size=6)
copies = st.integers(1, 4)


def hosts(domains: dict[str, str], holders: dict[ExpertKey, str] | None = None) -> OwnerHosts:
    return OwnerHosts(domains=domains, holders=lambda key: (holders or {}).get(key, ""))


def owned_bytes(owners: Owners, sizes_bytes: dict[ExpertKey, int], names: set[str]) -> Counter[str]:
    found = Counter(dict.fromkeys(names, 0))
    for key, owning in owners.items():
        found.update(dict.fromkeys(owning, sizes_bytes[key]))
    return found


@given(sizes, pools, copies)
def test_each_key_has_its_owners_in_as_many_domains_as_possible(
    sizes_bytes: dict[ExpertKey, int], domains: dict[str, str], copies: int
) -> None:
    found = deal_owners(sizes_bytes, hosts(domains), copies=copies)
    spread = min(copies, len(set(domains.values())))
    assert found.keys() == sizes_bytes.keys()
    for owning in found.values():
        assert len(owning) == len(set(owning)) == min(copies, len(domains))
        assert len({domains[host] for host in owning}) == spread
    assert ownerless(found) == ([] if domains else list(found))


@given(sizes, pools, pools, copies)
def test_what_experts_share_is_owned_by_all_their_owners(
    sizes_bytes: dict[ExpertKey, int], before: dict[str, str], after: dict[str, str], copies: int
) -> None:
    every = sizes_bytes | dict.fromkeys(SHARED_KEYS, 1)
    old = deal_owners(every, hosts(before), copies=copies)
    new = deal_owners(every, hosts(after), copies=copies, before=old)
    without = {key: own for key, own in old.items() if key not in SHARED_KEYS}
    assert without == deal_owners(sizes_bytes, hosts(before), copies=copies)
    for found in (old, new):
        for key in SHARED_KEYS:
            owning = [own for one, own in found.items() if one.layer == key.layer and one != key]
            assert sorted(found[key]) == sorted({host for own in owning for host in own})
    for key in SHARED_KEYS:
        staying = [host for host in old[key] if host in new[key]]
        assert list(new[key][: len(staying)]) == staying


@given(sizes, st.sets(st.sampled_from("abcdefgh"), min_size=1), copies)
def test_bytes_are_even_within_the_largest_key(
    sizes_bytes: dict[ExpertKey, int], names: set[str], copies: int
) -> None:
    """Where neither domains nor experts that are served decide."""
    for domains in ({name: name for name in names}, dict.fromkeys(names, "x")):
        found = deal_owners(sizes_bytes, hosts(domains), copies=copies)
        owned = owned_bytes(found, sizes_bytes, names)
        assert max(owned.values()) - min(owned.values()) <= max(sizes_bytes.values())


@given(sizes, pools, pools, copies)
def test_only_what_has_to_move_moves(
    sizes_bytes: dict[ExpertKey, int], before: dict[str, str], after: dict[str, str], copies: int
) -> None:
    domains = {host: before.get(host, domain) for host, domain in after.items()}
    old = deal_owners(sizes_bytes, hosts(before), copies=copies)
    new = deal_owners(sizes_bytes, hosts(domains), copies=copies, before=old)
    spread = min(copies, len(set(domains.values())))
    for key, owning in new.items():
        staying = [host for host in old[key] if host in domains]
        apart = len({domains[host] for host in staying})
        # An owner is given up only for one in another domain.
        assert len(set(staying) - set(owning)) <= max(spread - apart, 0)
        assert not staying or staying[0] == owning[0]
        assert len(owning) == min(copies, len(domains))
        assert len({domains[host] for host in owning}) == spread
    assert deal_owners(sizes_bytes, hosts(domains), copies=copies, before=new) == new


@given(sizes, pools, copies)
def test_the_order_of_the_arguments_does_not_show(
    sizes_bytes: dict[ExpertKey, int], domains: dict[str, str], copies: int
) -> None:
    found = deal_owners(sizes_bytes, hosts(domains), copies=copies)
    back = dict(reversed(sizes_bytes.items())), dict(reversed(domains.items()))
    assert deal_owners(back[0], hosts(back[1]), copies=copies) == found


def test_a_host_that_serves_an_expert_owns_it() -> None:
    holders = dict(zip(KEYS, "abcabcabcabc", strict=True))
    domains = {"a": "x", "b": "x", "c": "y", "d": "y"}
    found = deal_owners(dict.fromkeys(KEYS, 8), hosts(domains, holders), copies=2)
    assert {key: owning[0] for key, owning in found.items()} == holders
    assert first_owners(found, KEYS[:2]) == {KEYS[0]: "a", KEYS[1]: "b"}
    # Another domain comes before what is served.
    assert all({domains[host] for host in owning} == {"x", "y"} for owning in found.values())


def test_owners_that_had_to_share_a_domain_part_when_there_is_another() -> None:
    together = deal_owners(dict.fromkeys(KEYS, 8), hosts({"a": "x", "b": "x"}), copies=2)
    domains = {"a": "x", "b": "x", "c": "y"}
    found = deal_owners(dict.fromkeys(KEYS, 8), hosts(domains), copies=2, before=together)
    assert {key: owning[0] for key, owning in found.items()} == {
        key: owning[0] for key, owning in together.items()
    }
    assert {owning[1] for owning in found.values()} == {"c"}


def test_owners_beyond_what_is_asked_for_are_given_up() -> None:
    domains = {"a": "x", "b": "y", "c": "z"}
    before = {KEYS[0]: ("c", "a", "b")}
    found = deal_owners({KEYS[0]: 8}, hosts(domains), copies=2, before=before)
    assert found == {KEYS[0]: ("c", "a")}


def test_hosts_that_are_gone() -> None:
    owners = {KEYS[0]: ("a", "b"), KEYS[1]: ("b",)}
    left = without_hosts(owners, {"b"})
    assert left == {KEYS[0]: ("a",), KEYS[1]: ()}
    assert ownerless(left) == [KEYS[1]]
    assert first_owners(left, KEYS) == {KEYS[0]: "a"}
    assert keys_by_host(owners) == {"a": [KEYS[0]], "b": [KEYS[0], KEYS[1]]}


@pytest.mark.parametrize("copies", [1, 2])
def test_a_pool_without_hosts_owns_nothing(copies: int) -> None:
    assert deal_owners({KEYS[0]: 8}, hosts({}), copies=copies) == {KEYS[0]: ()}
