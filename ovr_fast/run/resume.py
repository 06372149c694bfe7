"""What a checkpoint holds beside the learners' pieces, and what a resumed run may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ovr_fast.config import Config, load_config
from ovr_fast.learner.learner import Learner
from ovr_fast.parallel.checkpoint import (
    CheckpointWriter,
    copied,
    read_meta,
    read_pieces,
    restore_rng,
    rng_pieces,
)
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.settings import ConfigError, settings_of


class Stateful(Protocol):
    """Something small that a checkpoint holds, such as a position in the data."""

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on from here; numbers, strings and lists."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""


State = dict[str, Learner | Stateful]
"""What a recipe stage must keep, by name."""


def check_run_folder(folder: Path) -> None:
    """Raises ConfigError if a folder is not one of a run; says which is, where it can."""
    if (folder / "checksums.json").is_file() and (folder.parents[1] / "config.toml").is_file():
        raise ConfigError(
            f"{folder} is a checkpoint: go on from it with --resume {folder.parents[1]} "
            f"--checkpoint {folder.name}"
        )
    if not (folder / "config.toml").is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has no config.toml; give --resume RUN.ROOT/RUN.NAME"
        )


def check_resume(config: Config, folder: Path) -> None:
    """Raises ConfigError if ``config`` would make the resumed run another one."""
    path = folder / "config.toml"
    before = {setting.name: setting.value for setting in settings_of(load_config(path))}
    for setting in settings_of(config):
        if not setting.rule.may_change and before[setting.name] != setting.value:
            raise ConfigError(
                f"{setting.name} was {before[setting.name]!r} in {folder} and is "
                f"{setting.value!r} now; a resumed run keeps its settings (start a new run to "
                "change them)"
            )


def save_state(
    writer: CheckpointWriter,
    recipe_stage: str,
    step: int,
    state: State,
    *,
    kind: str,
    row: dict[str, Any],
    weights: dict[str, str],
    mesh: Mesh,
) -> None:
    """Begin to write a checkpoint of ``state`` after ``step`` steps. A collective.

    Args:
        kind: of the rollout source, without which the run cannot go on as it was.
        row: the step's metrics, should the file of them have lost its end.
        weights: checksums of the files that the recipe stage began with.
    """
    copies = [copied(piece) for piece in rng_pieces(mesh)]
    meta: dict[str, Any] = {"step": step, "rollouts": kind, "learner_steps": {}, "state": {}}
    meta |= {"row": row, "weights": weights}
    for name, item in state.items():
        if isinstance(item, Learner):
            with item.on_device():  # one after the other on the device
                copies += [copied(piece) for piece in item.pieces() if piece.owned]
            meta["learner_steps"][name] = item.steps_done
        else:
            meta["state"][name] = item.state()
    writer.save(recipe_stage, step, copies, meta)


def restore_state(checkpoint: Path, state: State, mesh: Mesh) -> None:
    """Fill ``state`` from a checkpoint, whatever layout wrote it. A collective.

    Raises:
        CheckpointError: a file is damaged, or a tensor is missing.
    """
    meta, random = read_meta(checkpoint), rng_pieces(mesh)
    read_pieces(checkpoint, random, mesh)
    for name, item in state.items():
        if isinstance(item, Learner):
            with item.on_device():
                read_pieces(checkpoint, item.pieces(), mesh)
                item.restored(meta["learner_steps"][name])
        else:
            item.restore(meta["state"][name])
    restore_rng(random, mesh)
