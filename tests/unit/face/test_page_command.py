"""`moesaic page`: where the key of the page's actions is, and where it is not."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from moesaic import page_address
from moesaic.cli.main import main
from moesaic.session import ClusterSession, session_dir, write_session

KEY = "ab12" * 16
AT = "http://127.0.0.1:8002"


@pytest.fixture(autouse=True)
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(page_address, "_OPENING_S", 0.0)
    monkeypatch.setattr(ClusterSession, "alive", True)
    announce()


def announce(**more: Any) -> None:
    values = {"monitoring": AT, "operator_key": KEY, **more}
    found = ClusterSession(name="local", pid=1, started=0.0, ray_address="127.0.0.1:6379", **values)
    write_session(found)


def test_the_key_is_in_the_fragment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", "--print"]) == 0
    found = urlsplit(capsys.readouterr().out.strip())
    assert f"{found.scheme}://{found.netloc}{found.path}{found.query}" == f"{AT}/"
    assert unquote(found.fragment) == f"key={KEY}"


@pytest.mark.parametrize("opens", [True, False])
def test_a_browser_opens_it_through_a_private_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], opens: bool
) -> None:
    opened = []

    def browser(url: str) -> bool:
        file = Path(urlsplit(url).path)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert f'content="0; url={AT}/#key={KEY}"' in file.read_text()
        opened.append(url)
        return opens

    monkeypatch.setattr(page_address.webbrowser, "open", browser)
    assert main(["page"]) == (0 if opens else 1)
    said = capsys.readouterr()
    assert opened
    assert KEY not in said.out + said.err + opened[0]
    assert ("moesaic page --print" in said.err) is not opens
    assert [file.name for file in session_dir().iterdir()] == ["local.json"]


def test_a_cluster_without_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    announce(monitoring=None)
    assert main(["page", "--print"]) == 1
    assert "'local' has no page that this machine can reach" in capsys.readouterr().err


def test_a_session_of_an_older_version_opens_the_page_to_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    announce(operator_key=None)
    assert main(["page", "--print"]) == 0
    assert capsys.readouterr().out == f"{AT}/\n"
