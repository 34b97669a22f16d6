"""What differs between two specs, what a running cluster refuses, and which groups stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.spec.deployment import Deployment, host_part, regrouped
from moesaic.cluster.spec.differences import check_changeable, differences
from moesaic.cluster.spec.spec import Spec, parse_spec
from moesaic.proto.errors import SpecError
from tests.helpers.effort import tries


def spec_of(**values: Any) -> Spec:
    return parse_spec(values)


def first(spec: Spec) -> Deployment:
    groups = dict(enumerate(spec.hosts))
    return Deployment(id="1", spec=spec, models=[], groups=groups, order=list(groups))


def paths(before: Spec, after: Spec) -> list[str]:
    return [one.path for one in differences(before, after)]


def test_models_are_matched_by_name_and_groups_by_place() -> None:
    a, b = {"name": "a", "path": "/a"}, {"name": "b/c:d", "path": "/b"}
    before = spec_of(models=[a, b], hosts=[{"count": 2}])
    assert paths(before, spec_of(models=[b, a], hosts=[{"count": 2}])) == []
    after = spec_of(models=[b | {"replicas": 2}], hosts=[{"count": 2}, {"count": 1}])
    assert paths(before, after) == ["models.a", "models.b/c:d.replicas", "hosts.1"]
    gone, changed, new = differences(before, after)
    assert (gone.after, new.before) == (None, None)
    assert (changed.before, changed.after) == ("1", "2")


def test_a_spec_does_not_differ_from_the_one_that_is_stored() -> None:
    spec = spec_of(
        hosts=[{"count": 1, "memory_gb": 1, "labels": {"zone": "a"}, "lending": "never"}],
        models=[{"name": "m", "path": "/m", "idle_s": 60, "aliases": ["x"]}],
        timeouts={"attempt_s": 3},
    )
    stored = Deployment.from_json(first(spec).to_json())
    assert stored.spec == spec
    assert differences(stored.spec, spec) == []
    assert stored.as_stored.to_json() == stored.to_json()
    assert [host_part(stored.spec, one) for one in stored.spec.hosts] == [
        host_part(spec, one) for one in spec.hosts
    ]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "other"}, "name: a cluster is found by it"),
        ({"network": {"transport": "grpc"}}, "network.transport"),
        ({"endpoint": None}, "endpoint: a cluster has one"),
        ({"endpoint": {"port": 9}}, "endpoint.port"),
        ({"hosts": [{"count": 2, "placement_group": "PACK"}]}, "hosts.0: a placement group"),
    ],
)
def test_what_cannot_change_is_refused_with_the_reason(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        check_changeable(spec_of(hosts=[{"count": 2}]), spec_of(**{"hosts": [{}]} | values))


def test_a_placement_group_refuses_what_moves_it() -> None:
    plain, grouped = {"count": 1}, {"count": 2, "placement_group": "SPREAD"}
    both = spec_of(hosts=[plain, grouped])
    check_changeable(both, spec_of(hosts=[plain | {"max_count": 3}, grouped]))
    for hosts in ([grouped], [plain], [grouped, plain], [plain, grouped | {"count": 3}]):
        with pytest.raises(SpecError, match="a placement group of Ray keeps"):
            check_changeable(both, spec_of(hosts=hosts))


HOSTS = st.lists(
    st.fixed_dictionaries({"count": st.integers(1, 2), "threads": st.integers(1, 3)}),
    min_size=1,
    max_size=4,
)


@settings(max_examples=tries(200), deadline=None, derandomize=True)
@given(specs=st.lists(HOSTS, min_size=2, max_size=5))
def test_groups_keep_their_numbers_as_long_as_their_hosts_fit(
    specs: list[list[dict[str, int]]],
) -> None:
    there = first(spec_of(hosts=specs[0]))
    for hosts in specs[1:]:
        spec = spec_of(hosts=hosts)
        groups, order = regrouped(there, spec)
        assert len(order) == len(set(order)) == len(spec.hosts), "a group has one number"
        for place, number in enumerate(order):
            assert groups[number] == spec.hosts[place]
            if number in there.groups:
                old = host_part(there.spec, there.groups[number])
                assert old == host_part(spec, spec.hosts[place]), "its hosts would be others"
        # No host leaves while a group of its kind is wanted.
        kinds = [host_part(spec, one) for one in spec.hosts]
        for number in there.groups.keys() - set(order):
            kind = host_part(there.spec, there.groups[number])
            fresh = [n for n in order if n not in there.groups]
            assert kind not in [kinds[order.index(n)] for n in fresh]
        there = replace(there, spec=spec, groups=groups, order=order)
        same = regrouped(there, spec)
        assert same == (groups, order), "the same spec again changes nothing"


def test_a_group_that_is_leaving_is_taken_back() -> None:
    one, two = {"count": 1, "threads": 1}, {"count": 1, "threads": 2}
    there = first(spec_of(hosts=[one, two]))
    less = spec_of(hosts=[one])
    groups, order = regrouped(there, less)
    there = replace(there, spec=less, groups=groups, order=order)
    assert regrouped(there, spec_of(hosts=[one, two]))[1] == (0, 1)
