"""A program in place of `actors/runtime/ray_head.py` whose Ray has a dashboard."""

from __future__ import annotations

import json
import sys

from moesaic.actors.runtime.ray_head import main

if __name__ == "__main__":
    main({**json.loads(sys.argv[1]), "include_dashboard": True}, int(sys.argv[2]))
