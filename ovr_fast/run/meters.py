"""Tokens and FLOPs a second of a step, and its peak memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist

from ovr_fast.observe.clock import OUTSIDE, TRAINING
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.shape.cost import peak_tflops


def throughput(metrics: dict[str, float], mesh: Mesh) -> dict[str, float]:
    """``perf/...`` metrics of a step.

    Args:
        metrics: of the step, its ``time/PHASE_s`` among them.
        mesh: whose ranks did the step.

    Returns:
        ``perf/tokens_per_second`` of what the step produced (RL: response tokens) or read (cold
        start: all tokens), over its time but for start, evaluation, export and saving; and, where
        ``perf/train_tflop`` was counted, ``perf/tflops_per_rank`` over the training phases and what
        was done while servers sampled (``time/hidden_s``) and, on a GPU whose peak is known,
        ``perf/mfu``.
    """

    def seconds(phases: tuple[str, ...]) -> float:
        return sum(metrics.get(f"time/{phase}_s", 0.0) for phase in phases)

    tokens = metrics.get("cold_start/tokens", metrics.get("rollout/response_tokens", 0.0))
    working = max(metrics["time/step_s"] - seconds(OUTSIDE), 1e-9)
    found = {"perf/tokens_per_second": tokens / working}
    if "perf/train_tflop" in metrics:
        trained = seconds((*TRAINING, "hidden"))
        rate = metrics["perf/train_tflop"] / max(trained, 1e-9) / mesh.world
        found["perf/tflops_per_rank"] = rate
        if mesh.device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(mesh.device))
            if peak is not None:
                found["perf/mfu"] = rate / peak
    return found


def peak_memory_gib(mesh: Mesh) -> float:
    """Peak memory since the last call, of the rank that had most, GiB: of its GPU where there is
    one, else of its resident pages. A collective.

    Where the kernel does not let a process reset its peak (``/proc/self/clear_refs``), it is the
    peak since the process began.
    """
    if mesh.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    else:
        status = Path("/proc/self/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        peak = int(line.split()[1]) / 2**20
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    if mesh.world > 1:
        most = torch.tensor(peak, dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=mesh.control_group)
        peak = float(most)
    return peak
