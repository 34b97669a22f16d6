"""Hosts, trunks and commands that look at a model import transformers without compilers."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.models.architectures import ADAPTED, ARCHITECTURES, OWN
from tests.helpers.paths import ROOT

# Each architecture's file has imports of its own. The last line asks the stand-in for more than it
# has, as a library that compiles would.
PROBE = """
import sys
from moesaic.models.trunk.lean_imports import import_models
import_models()
import moesaic.actors.host.host, moesaic.actors.trunk.trunk
from moesaic.models.trunk.trunk import meta_model
from tests.helpers.models.architectures import tiny_config
for name in sys.argv[1:]:
    meta_model(tiny_config(name))
print(sorted({"scipy", "torch._dynamo.symbolic_convert"} & set(sys.modules)))
import torch
torch._dynamo.reset()
print("torch._dynamo.symbolic_convert" in sys.modules)
"""


def test_every_architecture_is_built_without_compilers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *ARCHITECTURES, *ADAPTED, *OWN],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("[]\nTrue\n", 0), done.stderr
