"""A run's folder, clock and checkpoints. Knows steps, rows and files, and no recipe.

``Run`` and ``ReplayRun`` have one interface: a replay computes, and changes nothing in the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ovr_fast import stopping
from ovr_fast.config import Config
from ovr_fast.data.rollouts import write_rollouts
from ovr_fast.data.streams import RunData
from ovr_fast.errors import OVRFastError
from ovr_fast.learner.finite import NonFinite
from ovr_fast.learner.learner import Learner
from ovr_fast.model.hf_weights import save_hf
from ovr_fast.observe.clock import Clock
from ovr_fast.observe.profiler import StepProfiler
from ovr_fast.parallel.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    list_checkpoints,
    read_meta,
    split_name,
    weights_checksums,
)
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import RolloutBatch
from ovr_fast.run.folder import NoFolder, RunFolder
from ovr_fast.run.lines import accuracy_line
from ovr_fast.run.meters import peak_memory_gib, throughput
from ovr_fast.run.resume import State, restore_state, save_state
from ovr_fast.settings import ConfigError
from ovr_fast.stopping import Stopped

STOP_FILE = "the file stop"

Line = Callable[[int, int, dict[str, float]], str]
"""From a step, the last step and metrics to the line that is printed (``run.lines``)."""


def find_checkpoint(folder: Path, *, resume: bool, name: str | None = None) -> Path | None:
    """The checkpoint to go on from; None for a new run, whose folder must be new.

    Args:
        name: of the checkpoint; None: the last one.

    Raises:
        ConfigError: there is none to resume from, or the folder holds a run.
    """
    checkpoints = list_checkpoints(folder / "checkpoints")
    if resume and not checkpoints:
        raise ConfigError(
            f"{folder} has no complete checkpoint to resume from: move it away, and start the run "
            "anew without --resume"
        )
    if name is not None:
        named = [path for path in checkpoints if path.name == name]
        if not named:
            known = ", ".join(path.name for path in checkpoints)
            raise ConfigError(f"--checkpoint {name}: {folder} has {known}")
        return named[0]
    if not resume and (folder / "metrics.jsonl").exists():
        raise ConfigError(
            f"{folder} holds a run; choose another run.name, remove the folder, or go on with "
            f"--resume {folder}"
        )
    return checkpoints[-1] if resume else None


def set_aside(checkpoints: Path, *, after: Path | None) -> None:
    """Checkpoints after the one that a run goes on from get a name that nobody resumes from."""
    for path in list_checkpoints(checkpoints):
        if after is not None and path > after:
            aside = path.with_name(f"{path.name}.set_aside")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            path.rename(aside)


def written_earlier(checkpoint: Path) -> CheckpointError:
    """A checkpoint that lacks what this version needs."""
    return CheckpointError(
        f"{checkpoint} was written by an earlier version; finish that run with the version that "
        "began it"
    )


def check_weights(checkpoint: Path, weights: Path, mesh: Mesh) -> None:
    """Whether a folder holds what a checkpoint's recipe stage began with: frozen parts and the
    reference are read there at a resume, too. A collective.

    Raises:
        CheckpointError: it does not; names the file.
    """
    before = read_meta(checkpoint).get("weights")
    if before is None:
        raise written_earlier(checkpoint)
    now = weights_checksums(weights, mesh)
    names = sorted(before.keys() | now.keys())
    odd = next((name for name in names if before.get(name) != now.get(name)), None)
    if odd is None:
        return
    how, way = "not what it was", "put it back"
    if odd not in now:
        how = "missing"
    elif odd not in before:
        how, way = "new", "take it away"
    raise CheckpointError(
        f"{weights / odd} is {how}: {checkpoint} goes on from what its stage began with, and "
        f"frozen parts and the reference are read there; {way}, or start a new run"
    )


def is_replay(checkpoint: Path | None, *, kind: str, flags: dict[str, str]) -> bool:
    """Whether a resumed run would train on rollouts of another kind than it was started with: it
    then only tries them, and leaves the run as it is.

    Args:
        checkpoint: to resume from; None for a new run.
        kind: of the rollout source.
        flags: how a command asks for each kind.

    Raises:
        ConfigError: the run was not started with servers, and would go on with them.
    """
    if checkpoint is None:
        return False
    before = read_meta(checkpoint).get("rollouts")
    if before is None:
        raise written_earlier(checkpoint)
    if before != "vllm" and kind == "vllm":
        raise ConfigError(
            f"{checkpoint.parents[1]} trains on {before} rollouts: resume it with "
            f"{flags[before]}, as it was started"
        )
    return kind != before


class Run:
    """A run that is recorded.

    Args:
        config: the resolved settings.
        mesh: this rank's position and groups.
        folder: of the run.
        checkpoint: to go on from; None for a new run.
        base: Hugging Face folder whose tokenizer and processor exported models get.
        rollout_kind: kind of the rollout source.
        profile: first and last step to trace; None: none.
    """

    records = True

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        *,
        folder: Path,
        checkpoint: Path | None,
        base: Path,
        rollout_kind: str,
        profile: tuple[int, int] | None,
    ) -> None:
        self.config, self.mesh, self.folder = config, mesh, folder
        self.checkpoint, self.base, self.rollout_kind = checkpoint, base, rollout_kind
        self.clock = Clock()
        self.profiler = StepProfiler(profile, folder / "trace", mesh.rank)
        self.log: RunFolder | NoFolder = NoFolder()
        if mesh.rank == 0 and self.records:
            keep = split_name(checkpoint) if checkpoint else None
            row = read_meta(checkpoint).get("row") if checkpoint else None
            self.log = RunFolder(folder, config, keep_until=keep, last_row=row)
            set_aside(folder / "checkpoints", after=checkpoint)
        self.writer = CheckpointWriter(
            folder / "checkpoints",
            mesh,
            keep=config.run.keep,
            identity=self.log.identity,
            clean=self.records,
        )
        self.recipe_stage, self.steps_done, self.last_step = "", 0, 0
        self.state: State = {}  # of the recipe stage
        self.weights: dict[str, str] = {}  # checksums of what the recipe stage began with
        self.saved = 0  # the last step with a checkpoint
        self.last_row: dict[str, float | str] = {}  # of metrics

    @property
    def resumed_in(self) -> str:
        """Recipe stage of the checkpoint that the run goes on from; empty for a new run."""
        return split_name(self.checkpoint)[0] if self.checkpoint else ""

    def done_in(self, recipe_stage: str) -> int:
        """Steps of a recipe stage that the checkpoint has behind it."""
        return (
            split_name(self.checkpoint)[1]
            if self.checkpoint and self.resumed_in == recipe_stage
            else 0
        )

    def say(self, text: str) -> None:
        """Print on the first rank."""
        if self.mesh.rank == 0:
            print(text, flush=True)

    def note_data(self, data: RunData) -> None:
        """Say how each source was read, and list the rows that were left out."""
        for line in data.said:
            self.say(line)
        if data.dropped:
            self.log.record_dropped(data.dropped)

    def note_weights(self, recipe_stage: str, folder: Path) -> None:
        """A recipe stage begins with these weights, which its checkpoints name. A collective."""
        if self.checkpoint is not None and self.resumed_in == recipe_stage:  # ``check_weights``
            self.weights = read_meta(self.checkpoint)["weights"]
        else:
            self.weights = weights_checksums(folder, self.mesh)

    def begin_or_resume(self, recipe_stage: str, state: State) -> None:
        """Begin a recipe stage, or go on in it from the checkpoint: fills ``state``. A collective.

        Raises:
            CheckpointError: a file is damaged, or a tensor is missing.
        """
        self.recipe_stage, self.state = recipe_stage, state
        self.steps_done = self.saved = self.done_in(recipe_stage)
        if self.checkpoint is not None and self.resumed_in == recipe_stage:
            restore_state(self.checkpoint, state, self.mesh)
            self.say(f"resumed from {self.checkpoint}")

    def steps(self, last: int) -> Iterator[int]:
        """The numbers of the steps to do; 1 is a stage's first."""
        self.last_step = last
        for number in range(self.steps_done + 1, last + 1):
            yield number
            if name := self.mesh.any_rank(stopping.asked() or self._stop_file()):
                self._save_last(number)
                raise Stopped(name, together=True)
        self.writer.wait()
        if self.profiler.waiting and self.recipe_stage == self.config.run.stages[-1]:
            self.say("--profile: none of its steps was run")

    @contextmanager
    def step(self, number: int) -> Iterator[Step]:
        """One step. What is not finite inside gets the way back, and its rollouts are kept; before
        any other error that every rank has, what the step before left gets a checkpoint, where no
        phase has ended since.

        Raises:
            NonFinite: see ``Learner.update``.
            OVRFastError: the run was asked to end, no server was left, or such.
        """
        step = Step(run=self, number=number)
        self.profiler.before(number)
        try:
            yield step
        except NonFinite as error:
            raise NonFinite(self._explain(error, step)) from error
        except OVRFastError as error:
            if error.together and not step.changed:
                try:
                    self._save_last(number - 1)
                except Exception as other:  # the cause is what is raised
                    self.say(f"step {number - 1} could not be kept: {other}")
            raise

    def record(
        self, recipe_stage: str, number: int, metrics: dict[str, float], line: Line | None
    ) -> None:
        """One row of metrics, with the time since the row before, and its line. A collective.

        Args:
            line: prints the step; None: nothing is printed.
        """
        self.writer.poll()
        metrics = metrics | self.clock.lap()
        metrics |= throughput(metrics, self.mesh)
        metrics["memory/peak_gib"] = peak_memory_gib(self.mesh)
        if line is not None and self.mesh.rank == 0:
            self.say(line(number, self.last_step, metrics))
        if accuracies := accuracy_line(metrics):
            self.say(f"held-out accuracy, {recipe_stage} step {number}: {accuracies}")
        if traced := self.profiler.after(number, metrics, last=number == self.last_step):
            self.say(traced)
        self.log.record(recipe_stage, number, metrics)
        self.last_row = {"stage": recipe_stage, "step": number, **metrics}

    def record_rollouts(self, step: int, batch: RolloutBatch) -> None:
        """The readable rollouts of a step, and all of them with ``run.record_rollouts``."""
        count = self.config.run.readable_rollouts
        self.log.record_rollouts(self.recipe_stage, step, batch, count)
        if self.config.run.record_rollouts:
            self.write_rollouts("rollouts", replace(batch, step=step))

    def write_rollouts(self, folder: str, batch: RolloutBatch) -> Path:
        """All rollouts of a step, for ``--rollouts``; rank 0 writes."""
        path = self.folder / folder / f"{batch.step:06d}.parquet"
        if self.mesh.rank == 0:
            write_rollouts(path, batch)
        return path

    def _stop_file(self) -> str:
        """A file "stop" in the run's folder asks for an end after the step; it is used up."""
        file = self.folder / "stop"
        if self.mesh.rank or not self.records or not file.exists():
            return ""
        file.unlink()
        return STOP_FILE

    def _save_last(self, number: int) -> None:
        """A checkpoint of the last whole step before the run ends, where it has none. A
        collective."""
        with stopping.not_inside():  # which would break it off again
            if self.saved < number and self.records and self.state:
                self.save(number, self.state)
            self.writer.wait()

    def save_is_due(self, number: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return number % self.config.run.save_every == 0 or number == self.last_step

    def save(self, number: int, state: State) -> None:
        """Begin to write a checkpoint. Its seconds count to the next row. A collective.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.saved = number
        with self.clock("save"), stopping.not_inside():  # which would leave the run without it
            save_state(
                self.writer,
                self.recipe_stage,
                number,
                state,
                kind=self.rollout_kind,
                row=self.last_row,
                weights=self.weights,
                mesh=self.mesh,
            )

    def export(self, learner: Learner, name: str) -> Path:
        """The model as a Hugging Face folder in the run's. A collective.

        Raises:
            SaveError: the disk is full or the folder cannot be written.
        """
        with self.clock("export"), learner.on_device(weights_only=True):
            rollout = self.config.rollout
            sampling = {"temperature": rollout.temperature, "top_p": rollout.top_p}
            save_hf(learner.model, self.folder / name, like=self.base, sampling=sampling)
        return self.folder / name

    def export_if_due(self, number: int, learner: Learner) -> None:
        """``export`` to hf_STEP every ``run.export_every`` steps."""
        every = self.config.run.export_every
        if every and number % every == 0:
            self.export(learner, f"hf_{number:06d}")

    def finish(self, learner: Learner) -> None:
        """The end of the last recipe stage: the model in ``hf``."""
        self.export(learner, "hf")
        self.say(f"done: {self.folder} (model in {self.folder / 'hf'})")

    def _explain(self, error: NonFinite, step: Step) -> str:
        self.writer.wait()
        found = list_checkpoints(self.folder / "checkpoints")
        message = f"{self.recipe_stage} step {step.recorded_in}: {error}. "
        if found:
            message += (
                f"The last good checkpoint is {found[-1]}; lower the rate and --resume "
                f"{self.folder}."
            )
        else:
            message += "There is no checkpoint yet; lower the rate and start anew."
        if self.recipe_stage == "rl":
            path = self.write_rollouts("nonfinite", step.rollouts)
            message += f" The step's batch is in {path}"
            if found and self.rollout_kind != "recorded":
                message += f": try it with --resume {self.folder} --only train --rollouts {path}"
        return message

    def close(self) -> None:
        """Finish the folder."""
        self.profiler.close()
        self.log.close()


class ReplayRun(Run):
    """A run's checkpoint on other rollouts: everything is computed and printed, and
    nothing is written but a trace that ``--profile`` asks for."""

    records = False

    def write_rollouts(self, folder: str, batch: RolloutBatch) -> Path:
        """Nothing is written."""
        return self.folder

    def save_is_due(self, number: int) -> bool:
        """Never."""
        return False

    def export(self, learner: Learner, name: str) -> Path:
        """Nothing is written."""
        return self.folder

    def finish(self, learner: Learner) -> None:
        """Nothing is written."""
        self.say(f"done: {self.folder} is as it was")

    def _explain(self, error: NonFinite, step: Step) -> str:
        return f"{self.recipe_stage} step {step.recorded_in}: {error}"


@dataclass(slots=True)
class Step:
    """One step of a run, while it lasts."""

    run: Run
    number: int
    rollouts: RolloutBatch = RolloutBatch(step=0)  # what a message about a failure keeps
    changed: bool = False  # a model, or what the stage keeps beside it

    @property
    def recorded_in(self) -> int:
        """The step whose rollouts these are: of recorded ones the step that recorded them."""
        return self.rollouts.step or self.number

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """``with step.phase("critic"): ...`` times a phase."""
        stopping.check()
        with self.run.clock(name):
            yield
        self.changed = True

    def record(self, metrics: dict[str, float], line: Line) -> None:
        """The step's rollouts and its row. A collective."""
        if self.rollouts.rollouts:  # rank 0 has them
            with self.phase("record"):
                self.run.record_rollouts(self.number, self.rollouts)
        self.run.record(self.run.recipe_stage, self.number, metrics, line)
