"""Which blocks are fastest on this card: each product alone, over rows of a tile and blocks."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesaic.kernels.grouped.configurations import Blocks, Configuration
from moesaic.kernels.grouped.ffn import TiledCall

from .layers import Layers, Shape
from .timing import graph_microseconds

_CALLS = 8
_SHARED_BYTES = 227 << 10  # a program's, on Hopper


def candidates(rows: int, *, up: bool, wide: bool) -> list[Blocks]:
    """Return blocks worth a try for tiles of ``rows``; ``wide`` allows those of large calls."""
    found = []
    if rows <= 16:
        grid = itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 6))
    elif not wide:
        grid = itertools.product((64, 128), (64, 128), (4, 8), (3, 4))
    else:
        grid = itertools.product((64, 128, 256), (64,), (4, 8), (3, 4))
    for columns, inner, warps, stages in grid:
        for described, swapped in itertools.product((False, True), (False, True)):
            if swapped and (columns < 64 or rows > 64):
                continue
            if rows <= 16 and columns == 32 and warps == 8:
                continue
            matrices = 2 if up else 1
            tile_bytes = (rows + matrices * columns) * inner * 2
            if stages * tile_bytes > _SHARED_BYTES or stages * tile_bytes < 24 << 10:
                continue
            # Accumulators in registers: 255 for each thread, of which some hold addresses.
            if rows * columns * matrices > warps * 32 * 160:
                continue
            found.append(Blocks(columns, inner, warps, stages, described, swapped))
    return found


@dataclass(frozen=True, slots=True)
class Found:
    """The best of one product for one call's size and rows of a tile."""

    tokens: int
    rows: int
    product: str
    blocks: Blocks
    microseconds: float


def search(
    layers: Layers, tokens: int, rows_of_a_tile: Sequence[int], deadline: float
) -> tuple[list[Found], list[dict[str, Any]]]:
    """Return the best blocks for each number of rows, and every time that was taken."""
    best: list[Found] = []
    taken: list[dict[str, Any]] = []
    count = _CALLS if tokens < 8192 else 4
    calls = layers.calls(tokens, count)
    wide = tokens >= 1024
    for rows in rows_of_a_tile:
        for product in ("up", "down"):
            if time.monotonic() > deadline:
                return best, taken
            found: list[Found] = []
            for blocks in candidates(rows, up=product == "up", wide=wide):
                if time.monotonic() > deadline:
                    break
                try:
                    elapsed = _time(layers, calls, rows, product, blocks)
                except Exception as error:  # a candidate that the compiler refuses
                    taken.append(
                        {
                            "tokens": tokens,
                            "rows": rows,
                            "product": product,
                            **asdict(blocks),
                            "error": str(error)[:200],
                        }
                    )
                    continue
                found.append(Found(tokens, rows, product, blocks, elapsed))
                taken.append(
                    {
                        "tokens": tokens,
                        "rows": rows,
                        "product": product,
                        **asdict(blocks),
                        "us": round(elapsed, 2),
                    }
                )
            if found:
                best.append(min(found, key=lambda f: f.microseconds))
    return best, taken


def _time(layers: Layers, calls: list[Any], rows: int, product: str, blocks: Blocks) -> float:
    config = Configuration(rows, blocks, blocks)
    tiled = [TiledCall(layers.slots[c.layer], c.ids_TK, layers.flags, config) for c in calls]
    if product == "up":
        runs = [lambda t=t, c=c: t.up(c.x_TH) for t, c in zip(tiled, calls, strict=True)]
    else:
        shape = layers.shape
        act = torch.randn(
            calls[0].ids_TK.numel(), shape.intermediate, device=layers.up_SUH.device
        ).bfloat16()
        runs = [lambda t=t: t.down(act) for t in tiled]
    return graph_microseconds(runs, rounds=3)


# ---- compiling in many processes, so that the search itself finds programs ready -----------------


def precompile(work: list[tuple[int, int, str, Blocks]], processes: int, deadline: float) -> int:
    """Compile (tokens, rows, product, blocks), for the cache on disk; return how many are done."""
    context = multiprocessing.get_context("spawn")
    shares = [work[n::processes] for n in range(processes)]
    queue = context.Queue()
    children = [
        context.Process(target=_compile, args=(share, queue), daemon=True) for share in shares
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()
            child.join()
    done = 0
    while not queue.empty():
        done += queue.get()
    return done


def _compile(share: list[tuple[int, int, str, Blocks]], queue: Any) -> None:
    shape = Shape(layers=1)
    slab = Layers(
        Shape(experts=128, layers=1, hidden=shape.hidden, intermediate=shape.intermediate)
    )
    done = 0
    by_tokens = {tokens: slab.calls(min(tokens, 2), 1)[0] for tokens, _, _, _ in share}
    for tokens, rows, product, blocks in share:
        call = by_tokens[tokens]
        try:
            tiled = TiledCall(
                slab.slots[0], call.ids_TK, slab.flags, Configuration(rows, blocks, blocks)
            )
            if product == "up":
                tiled.up(call.x_TH)
            else:
                tiled.down(
                    torch.zeros(
                        call.ids_TK.numel(),
                        shape.intermediate,
                        dtype=torch.bfloat16,
                        device="cuda",
                    )
                )
            done += 1
        except Exception as error:
            print(f"not compiled: {rows} {product} {blocks}: {str(error)[:100]}", file=sys.stderr)
    queue.put(done)
