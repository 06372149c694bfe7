"""The head's matrix product by how its row blocks are grouped, and with specialised warps (sm_90),
beside cuBLAS, on a GPU.

    python benchmarks/head_tiles.py [--json FILE]

Samples of all settings are taken in turns: a card under its power limit drifts by several per cent.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ovr_kernels import head
from ovr_kernels.reference import LogitOptions
from peers import DEVICE, HIDDEN, ROWS, VOCAB, draw

GROUPS = (8, 16, 32, 64)
USUAL = head.ROW_BLOCKS_A_GROUP
TILE_FOR = head.tile_for
ROUNDS, SAMPLES = 4, 6


def grouped(
    hidden, weight, targets, *, group: int, store: bool, pipeline: head.Pipeline | None = None
) -> Callable[[], object]:
    """The product with statistics, and with exponentials where they are stored."""

    def tile_for(capability: int, dtype: torch.dtype) -> head.Tile:
        return replace(TILE_FOR(capability, dtype), specialised=pipeline)

    def run() -> object:
        head.ROW_BLOCKS_A_GROUP, head.tile_for = group, tile_for
        operand = head.Head(weight=weight, bias=None, options=LogitOptions())
        return head.row_statistics(hidden, operand, targets, entropy=True, store=store)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="gets every sample")
    arguments = parser.parse_args()
    if DEVICE.type != "cuda":
        parser.error("needs a GPU")
    hidden, weight = draw(ROWS, HIDDEN)[0], draw(VOCAB, HIDDEN, scale=3.0 / HIDDEN**0.5)[0]
    targets = torch.randint(VOCAB, (ROWS,), device=DEVICE)
    pipelines: list[head.Pipeline] = []
    if head.capability_of(DEVICE) // 10 == 9:
        equal = replace(head.SHORT, lead=(0, 0))  # what a lead is worth
        pipelines = [head.LONG, head.SHORT, equal]
    work: dict[str, Callable[[], object]] = {"cuBLAS": lambda: hidden @ weight.t()}
    for store in (False, True):
        for group in GROUPS:
            name = f"{group} blocks a group{', stored' if store else ''}"
            work[name] = grouped(hidden, weight, targets, group=group, store=store)
        for pipeline in pipelines:
            name = f"specialised, {pipeline.depth} deep, lead {pipeline.lead[store]}"
            name += ", stored" if store else ""
            work[name] = grouped(
                hidden, weight, targets, group=USUAL, store=store, pipeline=pipeline
            )
    samples: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, run in work.items():
            run()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * SAMPLES)]
            for start, end in zip(events[::2], events[1::2], strict=True):
                start.record()
                run()
                end.record()
            torch.cuda.synchronize()
            samples[name] += [
                a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True)
            ]
    for name, times in samples.items():
        median = statistics.median(times)
        rate = 2.0 * ROWS * HIDDEN * VOCAB / median / 1e9
        print(f"{name:42} {median:8.3f} ms  best {min(times):8.3f}  {rate:7.1f} TFLOP/s")
    if arguments.json:
        arguments.json.write_text(json.dumps(samples, indent=1) + "\n")


if __name__ == "__main__":
    main()
