"""`moesaic up` whose trunks do what their prompts say (`tests/helpers/endpoint/scripted.py`).

Run as a program by tests that need answers which take as long as they say.
"""

from __future__ import annotations

import sys

from moesaic.actors.serve import trunk_apps
from moesaic.cli.ending import exit_with
from moesaic.cli.main import main
from tests.helpers.endpoint.scripted import scripted_engine

if __name__ == "__main__":
    # What the trunks' processes are given to call.
    trunk_apps.EngineFactory = lambda config: scripted_engine
    exit_with(main(sys.argv[1:]))
