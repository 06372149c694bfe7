"""The metrics that a short run must have, and the command that writes them anew.

    python tests/golden/golden.py            # runs both, says what moved against the files
    python tests/golden/golden.py --write    # and writes the files

A change that should not alter numbers leaves these files as they are. Where a last bit has to move
(another order of a sum), the commit that rewrites them says which and why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

UNCOMPARED = ("time/", "perf/", "memory/", "servers/")
"""Groups of metrics that are the machine's."""

BATCH_DEPENDENT = {"rollout/logprob_gap": 1e-5, "rollout/kl": 1e-5}
"""vLLM's log-probs depend, in the last bits, on which requests shared a batch: tolerances."""

ELSEWHERE = 1e-3
"""Relative tolerance on a machine whose matrix products sum in another order."""


def machine() -> dict[str, str]:
    """What decides the last bits of a float32 product, as far as it can be known: libraries choose
    their kernels by instruction sets, and their blocks by cache sizes."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    known = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size")
    found = {name: facts[name].strip() for name in known if name in facts}
    flags = " ".join(sorted(facts.get("flags", "").split()))
    return {
        **found,
        "flags": hashlib.sha256(flags.encode()).hexdigest()[:16],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def same_machine() -> bool:
    """Whether the files were written on a machine like this one: then they are met exactly."""
    return json.loads((FOLDER / "machine.json").read_text()) == machine()


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(row: dict) -> dict:
    """The part of a row that is compared."""
    return {key: value for key, value in row.items() if not key.startswith(UNCOMPARED)}


def differences(found: list[dict], golden: list[dict], *, exact: bool) -> list[str]:
    """Each value of ``found`` that is not the golden one, in words."""
    rows = [[(row["stage"], row["step"]) for row in side] for side in (found, golden)]
    if rows[0] != rows[1]:
        return [f"rows {rows[0]}, golden {rows[1]}"]
    moved = []
    for ours, theirs in zip(map(kept, found), map(kept, golden), strict=True):
        where = f"{ours['stage']} {ours['step']}"
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in ours or key not in theirs:
                moved.append(f"{where}: {key} is {'new' if key in ours else 'gone'}")
            elif not _agree(key, ours[key], theirs[key], exact):
                moved.append(f"{where}: {key} {ours[key]!r}, golden {theirs[key]!r}")
    return moved


def _agree(key: str, ours: object, theirs: object, exact: bool) -> bool:
    if ours == theirs:
        return True
    if not isinstance(ours, float) or not isinstance(theirs, float):
        return False
    if key in BATCH_DEPENDENT:
        return abs(ours - theirs) <= BATCH_DEPENDENT[key]
    return not exact and math.isclose(ours, theirs, rel_tol=ELSEWHERE, abs_tol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the files by what was found")
    arguments = parser.parse_args()
    from support import toy_run
    from support.processes import run_ranks

    with tempfile.TemporaryDirectory() as scratch:
        workplace = Path(scratch)
        toy_run.write_data(workplace / "toy_data")
        run_ranks(1, toy_run.both_stages(workplace))
        run_ranks(2, toy_run.two_ranks(workplace))
        for name, run in (("toy", "whole"), ("two_ranks", "two_ranks")):
            found = read_metrics(workplace / run / "metrics.jsonl")
            path = FOLDER / f"{name}.jsonl"
            golden = read_metrics(path) if path.exists() else []
            moved = differences(found, golden, exact=True)
            print(f"{path.name}: {len(moved)} values moved", *moved, sep="\n  ")
            if arguments.write:
                path.write_text("".join(json.dumps(kept(row)) + "\n" for row in found))
    if arguments.write:
        (FOLDER / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        print(f"written at {done.stdout.strip()}")


if __name__ == "__main__":
    main()
