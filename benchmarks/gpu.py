"""Experts on a card, serving and training: floors, errors, peers, a search for the fastest blocks.

It needs a CUDA device, PyTorch, Triton and transformers, and nothing of Ray; the parts about the
pool and about training also need what hosts and routers need. Parts come in order of worth, each
within what is left of the time, and one that fails costs no other.

    python -m benchmarks.gpu --seconds 240 --json gpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.card import backward, floors, layer, search
from benchmarks.card.layers import Layers, Shape
from moesaic.kernels.grouped.configurations import Configuration

# Rows of a tile that are worth a try, by the tokens of a call.
ROWS = {
    1: (16,),
    64: (16,),
    4096: (64, 128),
    8: (16,),
    1024: (64, 128),
    256: (16, 32, 64),
    16384: (128,),
}


class Run:
    """The parts, what each found, and the time that is left."""

    def __init__(self, seconds: float, path: Path | None) -> None:
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.found: dict[str, Any] = {}
        self._path = path

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        if time.monotonic() > self.deadline:
            print(f"{name}: no time left", flush=True)
            return None
        began = time.monotonic()
        try:
            self.found[name] = found = make()
        except Exception as error:
            found = None
            self.found[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name}: FAILED\n{traceback.format_exc(limit=4)}", flush=True)
        else:
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        if self._path is not None:
            self._path.write_text(json.dumps(self.found, indent=1))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--no-search", action="store_true", help="only the blocks of the table")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = Run(arguments.seconds, arguments.json)
    run.part("machine", _machine)
    floor = run.part("floors", lambda: asdict(floors.measure()))
    if floor is None:
        raise SystemExit("no floors, so nothing to compare with")
    print(floor, flush=True)
    limits = floors.Floors(**floor)
    layers = Layers(Shape())
    print(run.part("errors", lambda: {t: layer.check(layers, t) for t in (1, 3, 17, 64, 1000)}))
    for tokens in layer.SIZES:
        _line(
            run.part(
                f"layer {tokens}",
                lambda t=tokens: layer.compare(layers, t, limits, None, peers=["grouped_mm"]),
            )
        )
    for tokens in layer.SIZES:
        print(run.part(f"programs {tokens}", lambda t=tokens: layer.breakdown(layers, t)))
    print(run.part("pool", _pool), flush=True)
    print(run.part("backward errors", lambda: {t: backward.check(layers, t) for t in (3, 64)}))
    for tokens in backward.TOKENS:
        _line(run.part(f"backward {tokens}", lambda t=tokens: backward.compare(layers, t)))
    run.part("training", _training)
    best = None if arguments.no_search else run.part("search", lambda: _search(run, layers))
    for tokens, chosen in (best or {}).get("best", {}).items():
        config = _configuration(chosen)
        print(tokens, config, f"{chosen['us']:.1f} us both products", flush=True)
        print(
            run.part(f"error found {tokens}", lambda t=tokens, c=config: layer.check(layers, t, c))
        )
        print(
            run.part(
                f"programs found {tokens}",
                lambda t=tokens, c=config: layer.breakdown(layers, t, c),
            )
        )
        _line(
            run.part(
                f"layer found {tokens}",
                lambda t=tokens, c=config: layer.compare(
                    layers, t, limits, c, peers=["grouped_mm"]
                ),
            )
        )
    # Last, because it times many configurations of its own at its first call.
    for tokens in (64, 4096, 1, 1024, 16384):
        _line(
            run.part(
                f"liger {tokens}",
                lambda t=tokens: layer.compare(layers, t, limits, None, peers=["liger"]),
            )
        )


def _pool() -> list[dict[str, Any]]:
    """A layer call that is sent to hosts, or computed with their memory."""
    # It needs what hosts and routers need, such as gRPC; the other parts do without.
    from benchmarks.card import sent

    return sent.measure("cuda", rounds=3, intermediate=sent.INTERMEDIATE, experts=sent.EXPERTS)


def _training() -> list[dict[str, Any]]:
    """Whole steps with two hosts on the card, and in process."""
    # It needs what hosts and routers need.
    from benchmarks.card import training

    return training.measure("cuda", rounds=3)


def _machine() -> dict[str, Any]:
    return {
        "card": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _line(found: dict[str, Any] | None) -> None:
    if found is not None:
        print({k: v for k, v in found.items() if v}, flush=True)


def _search(run: Run, layers: Layers) -> dict[str, Any]:
    work = [
        (tokens, rows, product, blocks)
        for tokens, rows, wide in _programs()
        for product in ("up", "down")
        for blocks in search.candidates(rows, up=product == "up", wide=wide)
    ]
    began = time.monotonic()
    done = search.precompile(work, max(1, (os.cpu_count() or 2) - 1), run.deadline)
    print(f"compiled {done} of {len(work)} in {time.monotonic() - began:.1f} s", flush=True)
    found: list[search.Found] = []
    taken: list[dict[str, Any]] = []
    for tokens, rows in ROWS.items():
        best, times = search.search(layers, tokens, rows, run.deadline)
        found += best
        taken += times
        print(
            f"searched {tokens}: {len(times)} in all, {time.monotonic() - began:.1f} s", flush=True
        )
    return {"best": _best(found), "taken": taken}


def _programs() -> list[tuple[int, int, bool]]:
    """What is compiled differently: one token, and rows of a tile in calls that are wide or not."""
    found = {
        (min(tokens, 2), rows, tokens >= 1024) for tokens, all_ in ROWS.items() for rows in all_
    }
    return sorted(found)


def _best(found: list[search.Found]) -> dict[int, dict[str, Any]]:
    best: dict[int, dict[str, Any]] = {}
    for tokens, all_rows in ROWS.items():
        for rows in all_rows:
            both = {f.product: f for f in found if (f.tokens, f.rows) == (tokens, rows)}
            if len(both) < 2:
                continue
            us = sum(f.microseconds for f in both.values())
            if tokens not in best or us < best[tokens]["us"]:
                best[tokens] = {
                    "rows": rows,
                    "us": us,
                    "up": asdict(both["up"].blocks),
                    "down": asdict(both["down"].blocks),
                }
    return best


def _configuration(chosen: dict[str, Any]) -> Configuration:
    return Configuration(
        chosen["rows"], search.Blocks(**chosen["up"]), search.Blocks(**chosen["down"])
    )


if __name__ == "__main__":
    main()
