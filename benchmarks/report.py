"""Checks and all measurements of the kernels in one command.

    python benchmarks/report.py [--json FILE] [--samples 20] [--readme]
    python benchmarks/report.py --only-readme

First the parity gate and the accuracy of the head against float64; then every operator and peer:
median milliseconds, TFLOP/s or GB/s, per cent of the floor (on an H100 800 TFLOP/s and 3.0 TB/s,
elsewhere the same share of the data sheet: ovr_kernels/machines.py) and of the matrix product
measured beside it, and extra memory; then each prediction (python -m ovr_kernels.model) beside its
measurement. The JSON file has every sample. Without a GPU it times the references at small shapes,
where only ratios mean something, and says so. --readme writes predictions and every measurement in
benchmarks/results (*_kernels.json) into kernels/README.md, by the Triton of its other tables.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import triton

from ovr_kernels import model, parity
from ovr_kernels.machines import H100, MACHINES, Machine, machine_of
from ovr_kernels.objective import PolicyObjective
from peers import DEVICE, DTYPE, GPU, HIDDEN, ROWS, VOCAB, Missing, all_cases, draw, operators

MACHINE = (machine_of(torch.cuda.get_device_name()) if GPU else None) or H100  # for the floor

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "kernels" / "README.md", ROOT / "benchmarks" / "results"
TITLE = "| predicted, and measured |"


def accuracy() -> dict[str, float]:
    """Errors of the head at this device's shape: log-probs and gradients against float64."""
    rows = min(ROWS, 256)
    hidden = draw(rows, HIDDEN)[0].requires_grad_()
    weight = draw(VOCAB, HIDDEN, scale=3.0 / HIDDEN**0.5)[0].requires_grad_()
    targets = torch.randint(VOCAB, (rows,), device=DEVICE)
    advantages = torch.randn(rows, device=DEVICE)
    ours = operators()
    with torch.no_grad():
        found, entropy = ours.linear_logprob(hidden, weight, targets, return_entropy=True)
        logits = hidden.double() @ weight.double().t()
        logs = logits.log_softmax(-1)
        wanted = logs.gather(1, targets[:, None])[:, 0]
        wanted_entropy = -(logs.exp() * logs).sum(-1)
        slope = (-advantages / rows)[:, None].double() * -logs.exp()
        slope.scatter_add_(1, targets[:, None], (-advantages / rows)[:, None].double())
        by_hidden, by_weight = slope @ weight.double(), slope.t() @ hidden.double()
        alone = ours.linear_logprob(hidden[7:8], weight, targets[7:8])
        again = ours.linear_logprob(hidden, weight, targets)
    loss, statistics_ = ours.linear_policy_loss(
        hidden, weight, targets, PolicyObjective(), advantages=advantages, weights=1.0 / rows,
        old_logprobs=again, chunk=max(1, rows // 3),
    )  # fmt: skip
    loss.backward()
    return {
        "logprob_error": float(((found - wanted).abs() / (1 + wanted.abs())).max()),
        "entropy_error": float(((entropy - wanted_entropy).abs() / (1 + wanted_entropy)).max()),
        "hidden_gradient_error": parity.relative_error(hidden.grad, by_hidden),
        "weight_gradient_error": parity.relative_error(weight.grad, by_weight),
        "batch_invariant": bool(torch.equal(alone[0], found[7])),
        "repeatable": bool(torch.equal(again, found)),
        "first_ratio_is_one": bool(torch.equal(statistics_.logprobs, again)),
    }


def measure(work, samples: int) -> tuple[list[float], float]:
    """Milliseconds of each sample, and peak extra memory in MiB (0 on a CPU)."""
    for _ in range(2):
        work()
    if not GPU:
        times = []
        for _ in range(samples):
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e3)
        return times, 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * samples)]
    for start, end in zip(events[::2], events[1::2], strict=True):
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    return [a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True)], extra


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--readme", action="store_true", help="then fill kernels/README.md")
    parser.add_argument("--only-readme", action="store_true", help="and measure nothing")
    arguments = parser.parse_args()
    if (arguments.readme or arguments.only_readme) and (
        f"Triton {triton.__version__}:" not in README.read_text()
    ):
        parser.error(
            f"kernels/README.md predicts from another Triton's code than {triton.__version__}: "
            "keep the results in benchmarks/results, and run --only-readme in .venv"
        )
    if arguments.only_readme and arguments.json is not None:
        parser.error("--only-readme measures nothing for --json")
    named = arguments.json is not None and arguments.json.name.endswith("_kernels.json")
    if arguments.readme and not (named and arguments.json.resolve().parent == RESULTS):
        parser.error("--readme fills in benchmarks/results/*_kernels.json: name one with --json")
    failed = not arguments.only_readme and not measure_all(arguments.json, arguments.samples)
    if arguments.readme or arguments.only_readme:
        fill_readme()
    if failed:
        sys.exit("one of our own operators failed")


def measure_all(file: Path | None, samples: int) -> bool:
    """Checks, and a line an operator and peer; everything goes to ``file`` as it is there. Whether
    all of our own operators ran."""
    if GPU and machine_of(torch.cuda.get_device_name()) is None:
        print(f"no data sheet of a {torch.cuda.get_device_name()}: the floor is an H100's")
    machine = {
        "device": torch.cuda.get_device_name() if GPU else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "floor": MACHINE.name,
        "head": [ROWS, HIDDEN, VOCAB],
        "dtype": str(DTYPE),
    }
    print(machine)
    if GPU:
        shapes = parity.Shapes(
            hidden=HIDDEN, vocab=VOCAB, intermediate=18_944, heads=36, head_dim=128, rope_base=1e6,
            sections=(16, 24, 24), vision_hidden=1280, vision_intermediate=3420, vision_head_dim=80,
        )  # fmt: skip
        parity.check_parity(shapes, device=DEVICE, dtype=DTYPE)
        print("parity gate: passed")
    else:
        print("no GPU: the references, at small shapes; only ratios within this run mean something")
    checks = accuracy()
    print(checks)
    rows, yardstick = [], {}
    for case in all_cases():
        row: dict = {"operator": case.operator, "peer": case.peer}
        try:
            if GPU:
                torch.cuda.empty_cache()
            times, extra = measure(case.build(), samples)
        except Missing as error:
            row["missing"] = str(error)
        except Exception as error:  # reported, and the others still run
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            seconds = statistics.median(times) / 1e3
            if case.peer.endswith("alone"):
                yardstick[case.operator] = seconds
            row |= {"samples_ms": times, "median_ms": seconds * 1e3, "extra_mib": extra}
            if case.operations:
                row["tflops"] = case.operations / seconds / 1e12
                row["of_floor"] = case.operations / MACHINE.operations / seconds
                if case.operator in yardstick:
                    row["of_product"] = yardstick[case.operator] / seconds
            else:
                row["gb_per_s"] = case.bytes / seconds / 1e9
                row["of_floor"] = case.bytes / MACHINE.bytes / seconds
        rows.append(row)
        print(line(row), flush=True)
        if file is not None:  # after every row: a run that is cut short keeps what it has
            result = {"machine": machine, "checks": checks, "cases": rows}
            write(file, result)
    forward, step = "linear_logprob forward", "linear_policy_loss step"
    if GPU and machine_of(torch.cuda.get_device_name()) and {forward, step} <= yardstick.keys():
        try:
            predicted = model.predictions(
                MACHINE, forward_ms=yardstick[forward] * 1e3, products_ms=yardstick[step] * 1e3
            )
        except ValueError as error:  # the code has other loops than the model was told of
            print(f"no predictions from the code of Triton {triton.__version__}: {error}")
            predicted = {}
        if predicted:
            print("predicted from the machine code and those products, beside what was measured:")
        for name, ms in ours_of(rows).items() if predicted else ():
            found = predicted[name]
            points = (found.floor_ms / found.ms - found.floor_ms / ms) * 100
            print(f"{name:26} {cell(*found)} {cell(ms, found.floor_ms)} {points:+5.1f} points")
        if file is not None:
            result["predicted_ms"] = {name: found.ms for name, found in predicted.items()}
            write(file, result)
    return not any("failed" in row and row["peer"].startswith("ours") for row in rows)


def write(file: Path, result: dict) -> None:
    """All of it or nothing."""
    whole = file.with_name(file.name + ".new")
    whole.write_text(json.dumps(result, indent=1))
    whole.replace(file)


def ours_of(rows: list[dict]) -> dict[str, float]:
    """Milliseconds of our own operators among some cases, by their name in the model."""
    found = {}
    for row in rows:
        if "median_ms" not in row or not row["peer"].startswith("ours"):
            continue
        name = row["operator"]
        if row["peer"] == "ours, recomputing (four products)":
            name = "linear_logprob step"
        elif name.startswith("linear") and name.endswith("step") and row["peer"] == "ours":
            continue  # without a gradient buffer
        if not name.startswith("attention"):
            found[name] = row["median_ms"]
    return found


def cell(ms: float, floor_ms: float) -> str:
    """Of a table."""
    return f"{ms:.3g} ms, {floor_ms / ms:.0%}"


def predicted_beside_measured(measured: dict[Machine, dict[str, float]]) -> str:
    """As Markdown: a row an operator, a column a machine and one for what was measured there."""
    heads, columns = [], []
    for machine in MACHINES:
        predicted = model.predictions(machine)
        heads.append(machine.name)
        columns.append({name: cell(*found) for name, found in predicted.items()})
        if machine in measured:
            heads.append(f"{machine.name}, measured")
            columns.append(
                {name: cell(ms, predicted[name].floor_ms) for name, ms in measured[machine].items()}
            )
    lines = [f"{TITLE} {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in columns[0]:
        lines.append(f"| {name} | {' | '.join(each.get(name, '') for each in columns)} |")
    return "\n".join(lines)


def measured_results() -> dict[Machine, dict[str, float]]:
    """Milliseconds of our operators in ``benchmarks/results``."""
    measured: dict[Machine, dict[str, float]] = {H100: {}}
    for file in sorted(RESULTS.glob("*_kernels.json")):
        result = json.loads(file.read_text())
        machine = machine_of(result["machine"]["device"])
        if machine is not None:
            measured[machine] = ours_of(result["cases"])
    return measured


def fill_readme() -> None:
    """Of the kernels, with the table of all results."""
    before, _, after = README.read_text().partition(TITLE)
    if not after:
        sys.exit(f"{README} has no table that begins with {TITLE}")
    README.write_text(
        before + predicted_beside_measured(measured_results()) + "\n\n" + after.split("\n\n", 1)[1]
    )


def line(row: dict) -> str:
    """A row of the table."""
    name = f"{row['operator']:26} {row['peer']:36}"
    for word in ("missing", "failed"):
        if word in row:
            return f"{name} {word}: {row[word]}"
    text = f"{name} {row['median_ms']:9.3f} ms"
    if not GPU:
        return text
    text += (
        f" {row['tflops']:7.1f} TFLOP/s" if "tflops" in row else f" {row['gb_per_s']:7.1f} GB/s   "
    )
    text += f" {row['of_floor']:6.1%} of the floor"
    if "of_product" in row:
        text += f" {row['of_product']:6.1%} of the product"
    return f"{text} {row['extra_mib']:8.0f} MiB"


if __name__ == "__main__":
    main()
