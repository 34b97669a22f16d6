"""The image of deploy/Containerfile, on a Debian base: built, and run as the chart runs it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes.apart import need_namespaces
from tests.integration.conftest import save_model

pytestmark = [pytest.mark.alone, pytest.mark.slow]

BASE = "localhost/debian-with-python"
IMAGE = "localhost/moesaic"
TOOLS = ("buildah", "mmdebstrap", "unshare", "ip")
BUILD_S = 1500.0
RUN_S = 400.0
PYTHON = "/opt/moesaic/bin/python"

SPEC = """\
name: pod
ray: {address: auto}
network: {bind: node, lending: always}
models: [{name: m, path: /tmp/model, replicas: 2}]
hosts: [{count: 2, device: cpu}]
endpoint: {host: 0.0.0.0, port: 8000, drain_s: 5}
monitoring: {host: 0.0.0.0, port: 8002}
"""

# What KubeRay's command for a head does, and then what an operator does there.
SERVE = """\
set -eu
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n')"
ray start --head --num-cpus=4 --metrics-export-port=8080 --object-store-memory=900000000 \
  --node-ip-address=10.231.9.1 > /tmp/ray.log 2>&1
moesaic up -d /tmp/spec.yaml > /tmp/up.log 2>&1 || { cat /tmp/up.log; exit 1; }
moesaic complete --name pod --max-tokens 5 --json hello
before-stop head --settle-s=0 --drain-s=60 --metrics=http://127.0.0.1:8002/metrics
python - <<'ASK'
from urllib.request import urlopen
for port, path in ((8000, "/readyz"), (52365, "/api/healthz"), (8080, "/metrics")):
    print(path, urlopen(f"http://10.231.9.1:{port}{path}", timeout=20).status)
ASK
moesaic status --name pod
moesaic down --name pod
ray stop > /dev/null 2>&1
"""

IMPORT_ALL = """\
import importlib, pathlib, moesaic
root = pathlib.Path(moesaic.__path__[0])
files = (path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py"))
names = sorted(".".join(path.parts) for path in files)
names = [name.removesuffix(".__init__") for name in names]
imported = 0
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
        imported += 1
    except ModuleNotFoundError as error:
        # What comes with builds of torch for CUDA, or as an extra.
        assert error.name.partition(".")[0] in ("triton", "cuda", "vllm"), (name, error)
print(imported)
"""


class Image(NamedTuple):
    root: Path
    config: dict[str, object]


def run(command: Sequence[str], limit_s: float = BUILD_S) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=limit_s, check=False, cwd=ROOT
    )
    assert done.returncode == 0, f"{command[:4]}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def pip_settings(folder: Path) -> list[str]:
    """Volumes by which pip in the image installs from where pip installs here."""
    said = run([sys.executable, "-m", "pip", "config", "list"])
    settings = dict(re.findall(r"^\S*\.([\w-]+)='(.*)'$", said, re.MULTILINE))
    words = {word.removeprefix("file://") for value in settings.values() for word in value.split()}
    paths = {word.removesuffix("/simple") for word in words if word.startswith("/")}
    configuration = folder / "pip.conf"
    lines = [f"{name} = {value}" for name, value in settings.items()]
    configuration.write_text("\n".join(["[global]", *lines, ""]))
    volumes = [(str(configuration), "/etc/pip.conf")]
    volumes += [(path, path) for path in sorted(paths) if Path(path).exists()]
    return [word for here, there in volumes for word in ("--volume", f"{here}:{there}:ro")]


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    need_namespaces()
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    folder = Path(tempfile.mkdtemp(prefix="moesaic-image-"))
    store = ["--root", f"{folder}/store", "--runroot", f"{folder}/run", "--storage-driver", "vfs"]
    buildah = ["buildah", *store]
    try:
        packages = "python3,python3-venv,ca-certificates"
        tar = f"{folder}/debian.tar"
        run(["mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", tar])
        name = run([*buildah, "from", "scratch"]).strip()
        run([*buildah, "add", name, tar, "/"])
        run([*buildah, "commit", "--rm", name, BASE])
        recipe = ["--build-arg", f"BASE={BASE}", "-f", "deploy/Containerfile", "-t", IMAGE, "."]
        options = ["--isolation=chroot", "--layers=false", *pip_settings(folder)]
        run([*buildah, "build", *options, *recipe])
        name = run([*buildah, "from", IMAGE]).strip()
        config = json.loads(run([*buildah, "inspect", "--type", "container", name]))
        root = Path(run([*buildah, "mount", name]).strip())
        yield Image(root, config["OCIv1"]["config"])
        run([*buildah, "umount", name])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, as a volume that every user can read."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "mixtral", num_experts_per_tok=2)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def inside(image: Image, model: Path, *command: str) -> str:
    spec = model.parent / "spec.yaml"
    spec.write_text(SPEC)
    apart = ["unshare", "--mount", "--net", "--pid", "--ipc", "--fork", "--kill-child"]
    enter = ["sh", str(Path(__file__).with_name("enter.sh")), str(image.root), str(model)]
    environment = image.config["Env"]
    assert isinstance(environment, list)
    return run([*apart, *enter, str(spec), "env", "-i", *environment, *command], RUN_S)


def test_the_image_says_how_it_is_run(image: Image) -> None:
    assert image.config["User"] == "10001:10001"
    assert image.config["Entrypoint"] == ["moesaic"]


def test_nothing_can_be_written_but_what_is_mounted(image: Image, model: Path) -> None:
    command = "id -u; grep -h -e CapEff -e CapBnd -e NoNewPrivs /proc/self/status"
    command += "; for f in / /etc /opt /opt/moesaic /home /usr /var/tmp /var/cache"
    command += '; do ! touch "$f/x" 2> /dev/null || echo "written: $f"; done'
    command += "; for f in /tmp /cache /home/moesaic /dev/shm; do touch $f/x; done"
    said = inside(image, model, "bash", "-euc", command).split()
    assert said[0] == "10001"
    none = "0" * 16
    assert said[1:] == ["CapEff:", none, "CapBnd:", none, "NoNewPrivs:", "1"]


def test_every_module_can_be_imported(image: Image, model: Path) -> None:
    here = len(list((ROOT / "actors").rglob("*.py")))
    assert int(inside(image, model, PYTHON, "-c", IMPORT_ALL)) > here


def test_it_answers_a_request(image: Image, model: Path) -> None:
    said = inside(image, model, "bash", "-c", SERVE)
    answer, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
    assert answer["usage"]["completion_tokens"] == 5
    for path in ("/readyz", "/api/healthz", "/metrics"):
        assert f"{path} 200" in said
    # In one pod trunks and hosts share memory; shared memory needs no path that can be written.
    assert "computes with their memory" in said
