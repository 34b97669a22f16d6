"""The names of reports stay, the page describes them, and those of newer clusters are read."""

from __future__ import annotations

import json
import pickle
from enum import EnumMeta
from pathlib import Path
from typing import Any, get_args

import pytest

from moesaic.cluster.load.tracker import HORIZONS_S
from moesaic.cluster.reports.activity import AssignmentRates
from moesaic.cluster.reports.page import all_reports, reports_page
from moesaic.cluster.reports.placing import ChangePhase, ChangeReport
from moesaic.cluster.reports.report import HostState, OpenEnum, Report
from moesaic.cluster.reports.status import ClusterStatus
from tests.helpers.cluster.reports import CHANGE, cluster_report, host_report
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "reports.md"
# One line for each report or enum: its name, then its fields or values. A field that was added
# later, and so has a default, ends with "?".
PROMISED = Path(__file__).with_name("names.txt")


def names() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for report in all_reports():
        found[report.__name__] = [
            name if field.is_required() else f"{name}?"
            for name, field in report.model_fields.items()
        ]
        for field in report.model_fields.values():
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, EnumMeta):
                    found[kind.__name__] = [str(one) for one in kind]
    return found


def test_no_name_goes_and_new_ones_stand_in_the_list() -> None:
    lines = PROMISED.read_text().splitlines()
    promised = {name: words.split() for name, _, words in (line.partition(": ") for line in lines)}
    found = names()
    gone = {
        f"{report}.{word}"
        for report, words in promised.items()
        for word in set(words) - set(found.get(report, ()))
    }
    assert not gone, "a client that knows this name breaks: keep it, with its old meaning"
    new = {
        f"{report}.{word}"
        for report, words in found.items()
        for word in set(words) - set(promised.get(report, ()))
    }
    assert not new, f"add it to {PROMISED.name}; a new field of an old report has a default"


def test_every_field_says_what_it_is() -> None:
    missing = [
        f"{report.__name__}.{name}"
        for report in all_reports()
        for name, field in report.model_fields.items()
        if not field.description
    ]
    assert not missing
    assert all(report.__doc__ for report in all_reports())


def test_no_report_is_left_out_of_the_page() -> None:
    def below(kind: type[Report]) -> set[type[Report]]:
        return {kind}.union(*(below(one) for one in kind.__subclasses__()))

    ours = {one for one in below(Report) if one.__module__.startswith("moesaic.")}
    assert ours - {Report} == set(all_reports())


def test_the_page_is_made_of_the_code() -> None:
    assert PAGE.read_text() == reports_page(), "`make reports` writes it anew"


@pytest.mark.parametrize(
    "row",
    [
        "| `history` | list of [ChangeReport](#changereport) |",
        "| `obstacles` | mapping to string |",
        "| `phase` | `not_drained`, `draining`, `no_room`, `done` |",
        "| `placement` | [PlacementNumber](#placementnumber) or null |",
    ],
)
def test_types_in_words(row: str) -> None:
    assert row in reports_page()


# ---- read by others ------------------------------------------------------------------------------


def told(status: ClusterStatus) -> dict[str, Any]:
    return json.loads(json.dumps(status.model_dump(mode="json")))


def test_a_report_comes_back_from_json_and_from_ray_as_it_was() -> None:
    status = cluster_report(hosts=[host_report("h", state=HostState.GONE, process=None)])
    assert ClusterStatus.model_validate(told(status)) == status
    assert pickle.loads(pickle.dumps(status)) == status


def test_what_only_a_newer_cluster_knows_does_no_harm() -> None:
    values = told(cluster_report(hosts=[host_report("h")]))
    values["added"] = {"later": 1}
    values["hosts"][0] |= {"state": "on_holiday", "process": None, "added": 1}
    (host,) = ClusterStatus.model_validate(values).hosts
    assert (host.state, host.state.words) == ("on_holiday", "on holiday")
    assert host.state not in list(HostState)
    again = pickle.loads(pickle.dumps(host))
    assert again.model_dump(mode="json")["state"] == "on_holiday"


def test_what_is_no_word_at_all_is_refused() -> None:
    values = told(cluster_report(hosts=[host_report("h")]))
    values["hosts"][0]["state"] = 3
    with pytest.raises(ValueError, match="state"):
        ClusterStatus.model_validate(values)


def test_a_report_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        CHANGE.phase = ChangePhase.FAILED  # pyright: ignore[reportAttributeAccessIssue]


def test_words_for_people_have_no_underscore() -> None:
    assert ChangePhase.ROLLED_BACK.words == "rolled back"
    assert ChangeReport.model_validate({**CHANGE.model_dump(), "phase": "done"}) == CHANGE


def test_the_rates_are_those_of_the_load() -> None:
    assert list(AssignmentRates.model_fields) == [f"over_{seconds:g}_s" for seconds in HORIZONS_S]


def test_every_value_of_an_enum_is_one_word() -> None:
    for kind in OpenEnum.__subclasses__():
        assert all(value.isidentifier() and value.islower() for value in kind)
