"""The tables that a rehearsal prints."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from ovr_fast.config import Config
from ovr_fast.observe.clock import TRAINING
from ovr_fast.plan.memory import MemoryPlan, memory_plan
from ovr_fast.shape.cost import peak_tflops
from ovr_fast.shape.model_shape import read_shape

USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
CARD = "NVIDIA H100 80GB HBM3"
PHASE_COLUMNS = (
    ("times", "times"),
    ("allocated_gib", "allocated"),
    ("reserved_gib", "reserved"),
    ("launches", "launches"),
    ("matrix_products", "products"),
    ("waits", "waits"),
    ("copies_to_host", "to host"),
    ("collectives", "collectives"),
    ("collective_bytes", "GB"),
    ("host_s", "host s"),
)


def print_report(config: Config, world: int, folder: Path) -> None:
    """What the ranks wrote into ``folder``, by recipe stage, beside the plan."""
    shape = read_shape(config.model.path)
    for stage in config.run.stages:
        plan = memory_plan(config, shape, world, recipe_stage=stage)
        classes = ("weights", "gradients", "optimizer", "activations", "layer", "head")
        parts = ", ".join(f"{name} {getattr(plan, name):.1f}" for name in classes)
        print(f"\nplan, {stage}: {plan.total:.1f} GiB on the fullest rank ({parts})")
        reports = sorted((folder / "reports").glob(f"{stage}-*.json"))
        found = [json.loads(report.read_text()) for report in reports]
        for report in found:
            _print_rank(report)
            _print_classes(report, plan)
        for run in (stage, f"{stage}_0"):  # of all ranks, or of rank 0 alone
            _print_pace(folder / run / "metrics.jsonl", world)
        _print_kernels(folder / "triton")
        if found:
            print(f"\nwhere the host waits for the card (rank {found[0]['rank']}):")
            for place, count in list(found[0]["waits"].items())[:12]:
                print(f"  {count:6d}  {place}")


def _print_kernels(folder: Path) -> None:
    """Registers, stack (where spills go) and shared memory of what was compiled for the card."""
    from triton import __file__ as triton_file

    tool = Path(triton_file).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found: dict[str, list[tuple[int, int, int]]] = {}
    for cubin in sorted(folder.rglob("*.cubin")):
        done = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True)
        for name, registers, stack, shared in USAGE.findall(done.stdout):
            found.setdefault(name, []).append((int(registers), int(stack), int(shared)))
    if not found:
        return
    print("\n| Triton kernel | variants | registers | stack bytes | shared KiB |")
    print("|---|---|---|---|---|")
    for name, rows in sorted(found.items()):
        registers, stack, shared = (max(column) for column in zip(*rows, strict=True))
        shared = max(shared, *(_dynamic(path) for path in folder.rglob(f"{name}.json")))
        print(f"| {name} | {len(rows)} | {registers} | {stack} | {shared / 1024:.0f} |")


def _dynamic(path: Path) -> int:
    """Bytes of shared memory that a kernel is launched with."""
    return int(json.loads(path.read_text()).get("shared", 0))


def _print_rank(report: dict) -> None:
    print(
        f"\nrank {report['rank']}: at most {report['allocated_gib']:.1f} GiB allocated, "
        f"{report['reserved_gib']:.1f} reserved, {report['card_gib']:.1f} of the card's 79.6; "
        f"{report['seconds']:.0f} s on this machine"
    )
    if report["out_of_memory"]:
        print(f"  OUT OF MEMORY in {report['out_of_memory']}")
    print("| phase | " + " | ".join(title for _, title in PHASE_COLUMNS) + " |")
    print("|---" * (len(PHASE_COLUMNS) + 1) + "|")
    for phase, row in report["phases"].items():
        if not row["launches"] + row["copies_to_host"] + row["collectives"]:
            continue  # nothing of it was on the card
        cells = [_cell(key, row.get(key, 0)) for key, _ in PHASE_COLUMNS]
        print(f"| {phase} | " + " | ".join(cells) + " |")
    kinds = []
    for kind in ("all_gather", "reduce_scatter", "all_reduce", "reduce", "broadcast",
                 "send_or_receive"):  # fmt: skip
        rows = report["phases"].values()
        count, size = (sum(row.get(key, 0) for row in rows) for key in (kind, f"{kind}_bytes"))
        if count:
            kinds.append(f"{kind} {count:,.0f} ({size / 1e9:,.1f} GB)")
    print(f"collectives by kind: {', '.join(kinds) or 'none'}")


def _print_classes(report: dict, plan: MemoryPlan) -> None:
    """Plan and card class by class, at the update that had the largest peak. The plan is that of
    the fullest rank."""
    phases = report["phases"]
    peaks = {name: phases.get(name, {}).get("allocated_gib", 0.0) for name in report["resident"]}
    if not peaks:
        return
    fullest = max(peaks, key=lambda name: peaks[name])
    found = report["resident"][fullest]
    moment = max(plan.layer, plan.head)
    print(f"\n| {fullest}'s update | planned | on the card |\n|---|---|---|")
    for name, size in found.items():
        print(f"| {name} | {getattr(plan, name):.1f} | {size:.1f} |")
    rest = peaks[fullest] - sum(found.values())
    print(f"| activations, and a layer's backward or the head | {plan.activations + moment:.1f} | "
          f"{rest:.1f} |")  # fmt: skip


def _print_pace(metrics: Path, world: int) -> None:
    """Whether the host is ahead of the card, by the last step of rank 0, if it ran."""
    if not metrics.is_file():
        return
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not rows or "perf/train_tflop" not in rows[-1]:
        return
    host = sum(rows[-1].get(f"time/{phase}_s", 0.0) for phase in TRAINING)
    peak = peak_tflops(CARD)
    assert peak is not None
    card = rows[-1]["perf/train_tflop"] / world / (peak / 2)
    print(
        f"\npace: this machine's host launches the last step in {host:.1f} s; a card at half its "
        f"{peak:,.0f} TFLOP/s works {card:.1f} s on it"
    )


def _cell(key: str, value: float) -> str:
    if key.endswith("_gib") or key == "host_s":
        return f"{value:.1f}"
    if key == "collective_bytes":
        return f"{value / 1e9:.2f}"
    return f"{value:,.0f}"
