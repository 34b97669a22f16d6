"""The built wheel in an environment of its own: what a user has who never saw the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from moesaic.actors.runtime.embedded_ray import processes_of
from moesaic.session import session_dir
from tests.helpers.paths import ROOT
from tests.integration.conftest import save_model

ROOMS = ("actors", "cluster", "kernels", "models", "proto")
# What of these folders is made here, and belongs to no wheel.
MADE = ("__pycache__", "*.pyc", "*.egg-info")

Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, where no earlier build has left files that would get into the wheel."""
    copy = tmp_path_factory.mktemp("project")
    for folder in (*ROOMS, "src"):
        ignore = shutil.ignore_patterns(*MADE)
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    out = copy / "dist"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(
        [*command, str(copy)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an environment that has the wheel, and the dependencies of this one.

    A .pth file names this environment's packages. Python reads no .pth files of a folder that it
    has from one, so what stands here as an editable install, the project itself, is not there.
    """
    root, empty = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("empty")
    venv.create(root, symlinks=True, with_pip=False)
    python = root / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(root)}))
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    install = ["install", "-q", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    environment["PATH"] = f"{root / 'bin'}{os.pathsep}{environment['PATH']}"

    def run_in_empty_folder(program: str, *words: str, timeout_s: float = 100, **more: str) -> str:
        done = subprocess.run(
            [str(root / "bin" / program), *words],
            cwd=empty,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            f"--python={python}",
            *install,
        ],
        env=environment,
        check=True,
        timeout=100,
    )
    return run_in_empty_folder


def files_of_the_project() -> Iterator[str]:
    """The files of all packages, as the wheel is to have them."""
    for top in ROOMS:
        yield from (f"moesaic/{file.relative_to(ROOT)}" for file in written(ROOT / top))
    face = ROOT / "src" / "moesaic"
    for file in written(face):
        yield f"moesaic/{file.relative_to(face)}"


def written(folder: Path) -> Iterator[Path]:
    # `rglob` of Python 3.11 follows links: the rooms stand below src/moesaic, too.
    for found in sorted(folder.iterdir()):
        if found.is_symlink() or any(found.match(pattern) for pattern in MADE):
            continue
        yield from written(found) if found.is_dir() else [found]


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        licences = [name for name in opened.namelist() if name.endswith("/licenses/LICENSE")]
    project = set(files_of_the_project())
    assert {"moesaic/py.typed", "moesaic/proto/expert.proto", "moesaic/cli/main.py"} <= project
    assert sorted(project - names) == [], "not in the wheel"
    assert sorted(names - project) == [], "in the wheel, and not in the project"
    assert len(licences) == 1


def test_the_first_commands_of_a_user(run: Run, tmp_path: Path) -> None:
    where = run("python", "-c", "import moesaic.cluster.placement as it; print(it.__file__)")
    assert not where.startswith(str(ROOT))
    assert "environment" in where
    for command in (("moesaic",), ("python", "-m", "moesaic.cli.main")):
        assert "Elastic expert parallelism" in run(*command, "--help")
    assert json.loads(run("moesaic", "version", "--json"))["moesaic"]
    folder = save_model(tmp_path / "model", "mixtral")
    spec = tmp_path / "mine.yaml"
    spec.write_text(run("moesaic", "up", str(folder), "--print-spec"))
    free = {"MOESAIC__ENDPOINT__PORT": "0", "MOESAIC__MONITORING__PORT": "0"}
    assert (
        json.loads(run("moesaic", "spec", "check", str(spec), "--json", **free))["findings"] == []
    )


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_the_demo_is_served_from_the_wheel(run: Run) -> None:
    """`moesaic up` in an empty folder, a question, and the end, after which nothing is left."""
    name = f"wheel{os.getpid()}"
    free = {
        "MOESAIC__NAME": name,
        "MOESAIC__ENDPOINT__PORT": "0",
        "MOESAIC__MONITORING__PORT": "0",
    }
    run("moesaic", "up", "-d", "--json", timeout_s=600, **free)
    try:
        session = json.loads((session_dir() / f"{name}.json").read_text())
        started = processes_of(Path(session["ray_folder"]).name)
        assert started
        said = run("moesaic", "chat", "--name", name, "What is a mosaic?")
        assert said.strip()
    finally:
        run("moesaic", "down", "--name", name)
    _, alive = psutil.wait_procs(started, timeout=30)
    # Whoever adopted a process may not have looked yet.
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
