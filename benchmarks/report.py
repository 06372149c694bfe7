"""Checks and all measurements of the kernels in one command.

    python benchmarks/report.py [--json FILE] [--samples 20]

First the parity gate and the accuracy of the head against float64; then every operator and peer:
median milliseconds, TFLOP/s or GB/s, per cent of the floor (800 TFLOP/s, 3.0 TB/s: what an H100
reaches, not its data sheet) and of the matrix product measured beside it, and extra memory. Ends
with a table; the JSON file has every sample. Without a GPU it times the references at small shapes,
where only ratios mean something, and says so.
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
from ovr_kernels.objective import PolicyObjective
from peers import DEVICE, DTYPE, GPU, HIDDEN, ROWS, VOCAB, Missing, all_cases, draw, operators

FLOOR_OPERATIONS, FLOOR_BYTES = 800e12, 3.0e12


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
    arguments = parser.parse_args()
    machine = {
        "device": torch.cuda.get_device_name() if GPU else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
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
        if GPU:
            torch.cuda.empty_cache()
        try:
            times, extra = measure(case.build(), arguments.samples)
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
                row["of_floor"] = case.operations / FLOOR_OPERATIONS / seconds
                if case.operator in yardstick:
                    row["of_product"] = yardstick[case.operator] / seconds
            else:
                row["gb_per_s"] = case.bytes / seconds / 1e9
                row["of_floor"] = case.bytes / FLOOR_BYTES / seconds
        rows.append(row)
        print(line(row), flush=True)
        if arguments.json:  # after every row: a run that is cut short keeps what it has
            result = {"machine": machine, "checks": checks, "cases": rows}
            arguments.json.write_text(json.dumps(result, indent=1))
    forward, step = "linear_logprob forward", "linear_policy_loss step"
    hopper = GPU and torch.cuda.get_device_capability() == (9, 0)
    if hopper and {forward, step} <= yardstick.keys():
        predicted = model.predictions(
            model.all_epilogues((90,)),
            forward_ms=yardstick[forward] * 1e3,
            products_ms=yardstick[step] * 1e3,
        )
        for name in (forward, step):  # the step's is of ours into a gradient buffer
            print(f"{name:26} {'ours, predicted from the products':36} {predicted[name]:9.3f} ms")
        if arguments.json:
            result["predicted_ms"] = {name: predicted[name] for name in (forward, step)}
            arguments.json.write_text(json.dumps(result, indent=1))
    if any("failed" in row and row["peer"].startswith("ours") for row in rows):
        sys.exit("one of our own operators failed")


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
