"""One step in one line; the words are those of the metrics."""

from __future__ import annotations

from ovr_fast.observe.clock import PHASES


def phases(metrics: dict[str, float]) -> str:
    """Seconds of each phase that took any, in order."""
    timed = [(name, metrics.get(f"time/{name}_s", 0.0)) for name in PHASES]
    return " ".join(f"{name} {seconds:.1f}" for name, seconds in timed if seconds >= 0.05)


def _mfu(metrics: dict[str, float]) -> str:
    return f"mfu {metrics['perf/mfu']:.1%} | " if "perf/mfu" in metrics else ""


def rollout_line(step: int, last: int, metrics: dict[str, float]) -> str:
    """One step of ``--only rollout`` in one line."""
    m = metrics
    return (
        f"step {step:>4}/{last} | reward {m['rollout/reward']:.3f} | "
        f"len {m['rollout/length_tokens']:,.0f} tok | truncated {m['rollout/truncated']:.1%} | "
        f"{m['time/step_s']:.1f} s ({phases(m)}) | "
        f"{m['perf/tokens_per_second']:,.0f} tok/s"
    )


def step_line(step: int, last: int, metrics: dict[str, float]) -> str:
    """One RL step in one line; the words are those of the metrics."""
    m = metrics
    critic = ""
    if "critic/loss" in m:
        critic = f"critic {m['critic/loss']:.4f} ev {m['critic/explained_variance']:.2f} | "
    return (
        f"step {step:>4}/{last} | reward {m['rollout/reward']:.3f} | "
        f"len {m['rollout/length_tokens']:,.0f} tok | gap {m['rollout/logprob_gap']:.1e} | "
        f"clip {m['actor/clip_frac']:.1%} | actor gn {m['actor/grad_norm']:.2f} | "
        f"{critic or 'mixed {:.1%} | '.format(m['rollout/mixed_prompts'])}"
        f"{m['time/step_s']:.1f} s ({phases(m)}) | {m['perf/tokens_per_second']:,.0f} tok/s | "
        f"{_mfu(m)}{m['memory/peak_gib']:.1f} GiB"
    )


def cold_start_line(step: int, last: int, metrics: dict[str, float]) -> str:
    """One cold-start step in one line."""
    m = metrics
    return (
        f"step {step:>4}/{last} | loss {m['cold_start/loss']:.4f} | "
        f"gn {m['cold_start/grad_norm']:.2f} | lr {m['cold_start/lr']:.1e} | "
        f"{m['cold_start/examples']:.0f} examples, {m['cold_start/empty_share']:.1%} empty | "
        f"{m['time/step_s']:.2f} s ({phases(m)}) | {m['perf/tokens_per_second']:,.0f} tok/s | "
        f"{_mfu(m)}{m['memory/peak_gib']:.1f} GiB"
    )


def accuracy_line(metrics: dict[str, float]) -> str:
    """Accuracy of each held-out set; empty where nothing was evaluated."""
    return " | ".join(
        f"{key.removeprefix('eval/').removesuffix('/accuracy')} {value:.1%}"
        for key, value in metrics.items()
        if key.startswith("eval/") and key.endswith("/accuracy")
    )
