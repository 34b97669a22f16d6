"""Prints what this machine has, and where its versions differ from those of constraints.txt."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from tests.helpers.paths import ROOT

QUERY = "--query-gpu=name,driver_version,memory.total"


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def direct_dependencies() -> list[str]:
    """The names in pyproject's ``dependencies``, in its order."""
    text = (ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'^ *"([\w-]+)', block, re.MULTILINE)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def main() -> int:
    print(f"python {platform.python_version()}, torch {torch.__version__}", end=", ")
    print(f"triton {installed('triton')}, transformers {installed('transformers')}")
    if shutil.which("nvidia-smi"):
        print(*_cards(), sep="\n")
    pinned = {name.lower(): pin for name, pin in pins().items()}
    for package in ["pytest", "tokenizers", "huggingface_hub", *direct_dependencies()]:
        found, pin = installed(package), pinned.get(package.lower())
        if pin is not None and found.partition("+")[0] != pin:
            print(f"differs: {package} {found} (pinned: {pin})")
    if not torch.cuda.is_available():
        print("torch sees no CUDA device, so every test is skipped and nothing is shown")
        return 1
    return 0


def _cards() -> list[str]:
    asked = ["nvidia-smi", QUERY, "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()


if __name__ == "__main__":
    sys.exit(main())
