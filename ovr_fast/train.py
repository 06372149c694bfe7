"""The one command: both stages of the recipe, or one of them.

    torchrun --standalone --nproc-per-node N -m ovr_fast.train --config FILE.toml \\
        [section.key=value ...] [--resume DIR] [--dry-run] [--profile 4:6] \\
        [--only rollout | --only train --rollouts PATH | --fake-rollouts MEAN_TOKENS]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ovr_fast.batch import Prompt, Rollout
from ovr_fast.config import FROZEN_PARTS, Config, ConfigError, load_config
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.prompts import DataError, Mixture, read_source
from ovr_fast.data.rollouts import write_rollouts
from ovr_fast.evaluate import evaluate
from ovr_fast.learner import Learner, NonFinite, build_stage
from ovr_fast.model.attention import attention_kernel
from ovr_fast.model.cost import peak_tflops
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.hf_weights import save_hf
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.model.shape import ModelShape, find_model, read_shape
from ovr_fast.observe.clock import Clock, peak_memory_gib, release_memory
from ovr_fast.observe.profiler import StepProfiler, parse_steps
from ovr_fast.observe.run_folder import RunFolder, cold_start_line, rollout_line, step_line
from ovr_fast.parallel.checkpoint import (
    CheckpointWriter,
    copied,
    list_checkpoints,
    read_meta,
    read_pieces,
    restore_rng,
    rng_pieces,
    split_name,
)
from ovr_fast.parallel.mesh import Mesh, start_mesh
from ovr_fast.plan import check_layout, describe
from ovr_fast.ppo import PPO, rollout_metrics
from ovr_fast.rl.curriculum import ContextCurriculum
from ovr_fast.rl.rewards import Verifier
from ovr_fast.rollout.engine import RolloutEngine
from ovr_fast.sft import SFT
from ovr_fast.sources import MadeUp, Part, Recorded, RolloutSource, Sampled
from ovr_kernels import reference
from ovr_kernels.selection import describe as describe_operators
from ovr_kernels.selection import operators_for

RESUME_MAY_CHANGE = {
    "run.name", "run.root", "run.save_every", "run.keep", "run.export_every",
    "run.record_rollouts", "run.readable_rollouts", "run.wandb",
    "model.vision_patches", "model.vision_cache_mib", "model.recompute",
    "cold_start.steps", "rl.steps", "rl.context_steps", "evaluation.every",
    "parallel.world", "parallel.tensor", "parallel.pipeline", "parallel.offload",
    "cold_start.optimizer.lr", "rl.actor.lr", "rl.critic.lr",
    "reward.timeout_s", "reward.workers", "reward.max_failure_share",
    "rollout.servers", "rollout.urls", "rollout.tensor", "rollout.placement",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_gib", "rollout.max_in_flight", "rollout.startup_timeout_s",
    "rollout.request_timeout_s", "rollout.transfer_address",
}  # fmt: skip
"""Settings that a resumed run may change: where, on what layout and how long it works, and the
rates, which a diverging run needs lowered. Any other would make it another run."""


class Trainer:
    """A run: its folder, mesh, engine and stages.

    Args:
        config: the resolved settings.
        resume: a run folder to go on in; None for a new run.
        part: which half of RL to run.
        profile: first and last step to trace.
    """

    def __init__(
        self,
        config: Config,
        *,
        resume: Path | None,
        part: Part | None = None,
        profile: tuple[int, int] | None = None,
    ) -> None:
        self.config, self.part = config, part or Part()
        self.base = find_model(config.model.path)
        self.shape: ModelShape = read_shape(self.base)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if config.parallel.world not in (0, world):
            raise ConfigError(
                f"the settings plan for parallel.world={config.parallel.world} ranks, but {world} "
                f"were started; set parallel.world={world} (and check --dry-run)"
            )
        check_layout(config, self.shape, world)
        self._check_placement(world)
        self.folder = resume or Path(config.run.root) / config.run.name
        self.checkpoints = self.folder / "checkpoints"
        found = list_checkpoints(self.checkpoints)
        if resume and not found:
            raise ConfigError(f"{resume} has no complete checkpoint to resume from")
        if not resume and (self.folder / "metrics.jsonl").exists():
            raise ConfigError(
                f"{self.folder} holds a run; choose another run.name, remove the folder, or go on "
                f"with --resume {self.folder}"
            )
        self.checkpoint = found[-1] if resume else None
        self.replay = self._check_half()
        # Data is read before any process group or server exists: bad data ends at once.
        self.encoder = ChatEncoder(self.base, image_token_id=self.shape.image_token_id)
        self.evaluation_sets = {} if self.part.only else self._evaluation_sets()
        self.cold_start_stream = None if self.part.only else self._stream("cold_start")
        self.rl_stream = None if self.part.recorded else self._stream("rl")

        self.mesh: Mesh = start_mesh(
            tensor=config.parallel.tensor, pipeline=config.parallel.pipeline
        )
        self.clock = Clock()
        self.verifier = Verifier(config.reward)
        self.engine: RolloutEngine | None = None
        self.log: RunFolder | None = None
        self.profiler = StepProfiler(profile, self.folder / "trace", self.mesh.rank)
        self.writer = CheckpointWriter(
            self.checkpoints, self.mesh, keep=config.run.keep, clean=not self.replay
        )
        if self.mesh.rank == 0 and not self.replay:
            keep = split_name(self.checkpoint) if self.checkpoint else None
            self.log = RunFolder(self.folder, config, keep_until=keep)
        self._check_operators()

    def _check_half(self) -> bool:
        """Whether this only tries other rollouts from a run's checkpoint, and leaves the run as it
        is; with rollouts from where the run has them it goes on."""
        if self.checkpoint is None:
            return False
        before = read_meta(self.checkpoint)["source"]
        if before != "engine" and self.part.source == "engine":
            raise ConfigError(
                f"{self.folder} trains on {before} rollouts: resume it with --only train "
                "--rollouts, or --fake-rollouts, as it was started"
            )
        return self.part.source != before

    def _check_placement(self, world: int) -> None:
        rollout = self.config.rollout
        if rollout.placement == "disaggregated" or not torch.cuda.is_available():
            return
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) != world:
            raise ConfigError(
                "rollout.placement=colocated is for one node; on several use disaggregated"
            )
        if rollout.servers * rollout.tensor != world:
            raise ConfigError(
                f"rollout.placement=colocated needs an engine worker on each of the trainer's "
                f"{world} GPUs: rollout.servers={rollout.servers} x rollout.tensor="
                f"{rollout.tensor} is {rollout.servers * rollout.tensor}"
            )

    def say(self, text: str) -> None:
        """Print on the first rank."""
        if self.mesh.rank == 0:
            print(text, flush=True)

    def _check_operators(self) -> None:
        """Say which operators run; Triton's are compared with their references first."""
        device, model, shape = self.mesh.device, self.config.model, self.shape
        dtype = getattr(torch, model.dtype)
        operators = operators_for(device, model.kernels)
        self.say(
            f"attention: {attention_kernel(device.type, dtype)}; "
            f"operators: {describe_operators(operators, device)}"
        )
        if operators is not reference:
            from ovr_kernels.parity import Shapes, check_parity

            shapes = Shapes(
                hidden=shape.hidden,
                vocab=shape.vocab // self.mesh.tp,
                intermediate=shape.intermediate // self.mesh.tp,
                heads=(shape.heads + 2 * shape.kv_heads) // self.mesh.tp,
                head_dim=shape.head_dim,
                rope_base=shape.rope_base,
                sections=shape.mrope_sections,
                vision_hidden=shape.vision.hidden,
                vision_intermediate=shape.vision.intermediate,
                vision_head_dim=shape.vision.head_dim,
                temperature=self.config.rollout.temperature,
            )
            check_parity(shapes, device=device, dtype=dtype)

    def _evaluation_sets(self) -> dict[str, list[Prompt]]:
        """The held-out prompts by set; one that is too long for the engine is an error."""
        sets: dict[str, list[Prompt]] = {}
        for source in self.config.evaluation.sources:
            name = source.name or Path(source.path).stem
            if name in sets:
                raise ConfigError(f"two evaluation.sources are called {name!r}; give them names")
            sets[name] = read_source(source, need="answer", limit=self.config.evaluation.prompts)
            for prompt in sets[name]:
                if not self._fits(prompt):
                    raise DataError(
                        f"{source.path}: {prompt.id} is longer than rl.max_prompt_tokens="
                        f"{self.config.rl.max_prompt_tokens}; raise it or remove the row"
                    )
        return sets

    def _fits(self, prompt: Prompt) -> bool:
        tokens = self.encoder.encode(prompt.messages, prompt.pictures, generation_prompt=True)
        return len(tokens) <= self.config.rl.max_prompt_tokens

    def _stream(self, stage: str) -> Mixture | None:
        """The stage's data, mixed by weight; prompts that are too long are dropped, and said."""
        if stage not in self.config.run.stages:
            return None
        settings = getattr(self.config, stage)
        pools = []
        for source in settings.sources:
            pool = read_source(source, need="response" if stage == "cold_start" else "answer")
            if stage == "rl":
                limit, before = self.config.rl.max_prompt_tokens, len(pool)
                pool = [prompt for prompt in pool if self._fits(prompt)]
                if not pool:
                    raise DataError(
                        f"{source.path}: all {before} prompts are longer than "
                        f"rl.max_prompt_tokens={limit}"
                    )
                if len(pool) < before and os.environ.get("RANK", "0") == "0":
                    print(
                        f"{source.path}: dropped {before - len(pool)} prompts over {limit} tokens"
                    )
            pools.append(pool)
        return Mixture(
            pools, [source.weight for source in settings.sources], seed=self.config.run.seed
        )

    def run(self) -> None:
        """All stages, or the half of RL that was asked for."""
        stages = self.config.run.stages
        resumed_in = split_name(self.checkpoint)[0] if self.checkpoint else None
        weights = self.base
        if self.part.needs_engine and ("rl" in stages or self.evaluation_sets):
            self._start_engine(weights)
        if self.part.only == "rollout":
            self._rollouts_alone()
            return
        if resumed_in is None:
            self._evaluate("base", 0, {})
        if self.engine is not None and self.engine.sleeps:
            self.engine.wait_until_ready()  # it measures the free memory while it starts
            self.engine.sleep()
        if "cold_start" in stages:
            after = self.folder / "cold_start_hf"
            if resumed_in != "rl" and not self.part.only:
                self._cold_start(weights, after)
                release_memory()
            weights = after
        if "rl" in stages:
            self._rl(weights)
        if self.profiler.waiting:
            self.say("--profile: none of its steps was run")
        if not self.replay:
            self.say(f"done: {self.folder} (model in {self.folder / 'hf'})")

    def _start_engine(self, weights: Path) -> None:
        release_memory()  # of the operators' check, before an engine on this GPU looks for room
        self.engine = RolloutEngine(
            self.config,
            shape=self.shape,
            encoder=self.encoder,
            mesh=self.mesh,
            model_folder=weights,
            log_folder=self.folder / "logs",
        )
        sleeps = "gives its memory back while the trainer works" if self.engine.sleeps else "stays"
        self.say(
            f"rollout: {self.config.rollout.placement}, weights by {self.engine.backend}, "
            f"the engine {sleeps}"
        )

    def _evaluate(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Measure the held-out sets with the engine's weights, and record with ``metrics``."""
        if self.evaluation_sets:
            assert self.engine is not None
            self.engine.wait_until_ready()
            scores = evaluate(
                self.engine,
                self.evaluation_sets,
                self.verifier,
                self.mesh,
                max_tokens=self.config.rl.max_response_tokens,
            )
            metrics = {**metrics, **scores}
            accuracies = " | ".join(
                f"{name} {scores[f'eval/{name}/accuracy']:.1%}" for name in self.evaluation_sets
            )
            self.say(f"held-out accuracy, {stage} step {step}: {accuracies}")
            self.engine.sleep()
        if metrics and self.log is not None:
            self.log.record(stage, step, metrics)

    def _begin_step(self, step: int) -> None:
        self.clock.restart()
        self.profiler.before(step)

    def _finish_step(self, stage: str, step: int, total: int, metrics: dict[str, float]) -> bool:
        """Whether a checkpoint is due, after adding what every step reports."""
        self.writer.poll()
        tokens = metrics.get("cold_start/tokens", metrics.get("rollout/response_tokens", 0.0))
        metrics |= self.clock.times()
        metrics["perf/tokens_per_second"] = tokens / metrics["time/step_s"]
        metrics["memory/peak_gib"] = peak_memory_gib()
        if "perf/train_tflop" in metrics:
            phases = ("pack", "vision", "targets", "critic", "actor")
            seconds = sum(metrics[f"time/{phase}_s"] for phase in phases)
            rate = metrics["perf/train_tflop"] / seconds / self.mesh.world
            metrics["perf/tflops_per_rank"] = rate
            if self.mesh.device.type == "cuda":
                peak = peak_tflops(torch.cuda.get_device_name(self.mesh.device))
                if peak is not None:
                    metrics["perf/mfu"] = rate / peak
        line = cold_start_line if stage == "cold_start" else step_line
        self.say(line(step, total, metrics))
        if traced := self.profiler.after(step, metrics, last=step == total):
            self.say(traced)
        return not self.replay and (step % self.config.run.save_every == 0 or step == total)

    def _save(self, stage: str, step: int, learners: list[Learner], meta: dict) -> None:
        copies = [copied(piece) for piece in rng_pieces(self.mesh)]
        for learner in learners:  # one after the other on the device
            with learner.on_device():
                copies += [copied(piece) for piece in learner.pieces() if piece.owned]
        self.writer.save(
            stage,
            step,
            copies,
            {
                "step": step,
                "source": self.part.source,
                "learner_steps": {learner.name: learner.steps_done for learner in learners},
                **meta,
            },
        )

    def _restore(self, stage: str, learners: list[Learner]) -> dict | None:
        """What ``_save`` was given, if the run resumes inside this stage; the learners go on."""
        if self.checkpoint is None or split_name(self.checkpoint)[0] != stage:
            return None
        meta, random = read_meta(self.checkpoint), rng_pieces(self.mesh)
        read_pieces(self.checkpoint, random, self.mesh)
        for learner in learners:
            with learner.on_device():
                read_pieces(self.checkpoint, learner.pieces(), self.mesh)
                learner.restored(meta["learner_steps"][learner.name])
        restore_rng(random, self.mesh)
        self.say(f"resumed from {self.checkpoint}")
        return meta

    def _cold_start(self, weights: Path, after: Path) -> None:
        settings = self.config.cold_start
        assert self.cold_start_stream is not None
        stage = build_stage(
            self.shape, self.mesh, self.config.model, weights=weights, train_vision="frozen"
        )
        learner = Learner(
            "cold_start",
            stage,
            self._picture_encoder(stage),
            settings.optimizer,
            decay=settings.decay,
            total_steps=settings.steps,
            offload=self.config.parallel.offload,
        )
        self._print_trained("cold start", learner)
        sft = SFT(
            config=self.config,
            mesh=self.mesh,
            learner=learner,
            stream=self.cold_start_stream,
            encoder=self.encoder,
            clock=self.clock,
        )
        start = 0
        if state := self._restore("cold_start", [learner]):
            start = state["step"]
            self.cold_start_stream.restore(state["stream"])
            sft.dropped = state["dropped"]
        for step in range(start, settings.steps):
            self._begin_step(step + 1)
            try:
                metrics = sft.step()
            except NonFinite as error:
                raise NonFinite(
                    f"cold start step {step + 1}: {error}. {self._way_back()}"
                ) from error
            due = self._finish_step("cold_start", step + 1, settings.steps, metrics)
            last = step + 1 == settings.steps
            if not last and self.log is not None:
                self.log.record("cold_start", step + 1, metrics)
            if last:
                with learner.on_device(weights_alone=True):
                    save_hf(learner.stage, after, like=self.base)
                    if self.engine is not None:
                        self.engine.wait_until_ready()
                        self.engine.load(
                            learner.stage, policy_version=0, skip_parts=FROZEN_PARTS["frozen"]
                        )
                self._evaluate("cold_start", step + 1, metrics)
            if due:
                self._save(
                    "cold_start",
                    step + 1,
                    [learner],
                    {"stream": self.cold_start_stream.state(), "dropped": sft.dropped},
                )
        self.writer.wait()
        if "rl" not in self.config.run.stages:
            self._export(learner, "hf")

    def _picture_encoder(self, stage: Qwen25VLStage) -> PictureEncoder:
        return PictureEncoder(
            stage.visual,
            self.shape.vision,
            self.mesh,
            self.encoder.pictures,
            patch_budget=self.config.model.vision_patches,
            cache_mib=self.config.model.vision_cache_mib,
        )

    def _build_ppo(self, weights: Path) -> PPO:
        """Actor, critic and, with a KL term, reference, all from the same weights."""
        settings = self.config.rl

        def build(**options):
            return build_stage(self.shape, self.mesh, self.config.model, weights=weights, **options)

        policy = build()
        encoder = self._picture_encoder(policy)
        # While frozen, one tower and what it made of a picture serve all models.
        tower = None if encoder.trained else policy.visual
        valuer = build(value_head=True, seed=self.config.run.seed, tower=tower)
        reference = None
        if settings.kl_coef:
            reference = build(train_vision="frozen", tower=tower).requires_grad_(False)
        shared = dict(decay=settings.decay, offload=self.config.parallel.offload)
        actor = Learner(
            "actor",
            policy,
            encoder,
            settings.actor,
            total_steps=settings.steps * settings.policy_steps,
            **shared,
        )
        critic = Learner(
            "critic",
            valuer,
            self._picture_encoder(valuer) if encoder.trained else encoder,
            settings.critic,
            total_steps=settings.steps * settings.critic_steps,
            **shared,
        )
        self._print_trained("actor", actor)
        return PPO(
            config=self.config,
            mesh=self.mesh,
            actor=actor,
            critic=critic,
            reference=reference,
            reference_encoder=(
                self._picture_encoder(reference) if reference and encoder.trained else encoder
            ),
            engine=self.engine,
            encoder=self.encoder,
            clock=self.clock,
        )

    def _rl(self, weights: Path) -> None:
        if self.engine is not None:
            self.engine.sleep()
        ppo, curriculum = self._build_ppo(weights), ContextCurriculum(self.config.rl)
        learners, start = [ppo.actor, ppo.critic], 0
        if state := self._restore("rl", learners):
            start = state["step"]
            curriculum.restore(state["curriculum"])
            if self.rl_stream is not None:
                self.rl_stream.restore(state["stream"])
        source, total = self._source(start)
        if self.engine is not None:
            self.engine.wait_until_ready()
        ppo.publish(policy_version=start)
        for step in range(start, total):
            self._begin_step(step + 1)
            curriculum.start(step)
            turn, prompts, rollouts = source(step, curriculum.limit)
            try:
                metrics = ppo.learn(turn, prompts, rollouts)
            except NonFinite as error:
                raise NonFinite(self._explain(error, turn + 1, prompts, rollouts)) from error
            ppo.publish(step + 1)
            metrics["rollout/limit_tokens"] = float(curriculum.limit)
            curriculum.observe(metrics["rollout/length_tokens"])
            due = self._finish_step("rl", step + 1, total, metrics)
            self._record_step(step + 1, total, metrics, prompts, rollouts)
            export = self.config.run.export_every
            if export and (step + 1) % export == 0 and not self.replay:
                self._export(ppo.actor, f"hf_{step + 1:06d}")
            if due:
                ppo.actor.encoder.forget()
                self._save(
                    "rl",
                    step + 1,
                    learners,
                    {
                        "stream": self.rl_stream.state() if self.rl_stream else None,
                        "curriculum": curriculum.state(),
                    },
                )
        self.writer.wait()
        if not self.replay:
            self._export(ppo.actor, "hf")

    def _source(self, start: int) -> tuple[RolloutSource, int]:
        """Where rollouts come from, and how many steps there are in all."""
        steps, stream = self.config.rl.steps, self.rl_stream
        if self.part.recorded is not None:
            recorded = Recorded(self.part.recorded, start=start)
            total = start + len(recorded.files)
            return recorded, total if self.replay else min(steps, total)
        assert stream is not None
        if self.part.fake_tokens:
            made_up = MadeUp(
                self.config,
                stream=stream,
                shape=self.shape,
                encoder=self.encoder,
                mean_tokens=self.part.fake_tokens,
            )
            return made_up, steps
        assert self.engine is not None
        sampled = Sampled(
            self.config,
            stream=stream,
            engine=self.engine,
            verifier=self.verifier,
            mesh=self.mesh,
            clock=self.clock,
        )
        return sampled, steps

    def _rollouts_alone(self) -> None:
        """``--only rollout``: sample and score with the weights of model.path, and record."""
        curriculum = ContextCurriculum(self.config.rl)
        source, total = self._source(0)
        assert self.engine is not None
        self.engine.wait_until_ready()
        for step in range(total):
            self._begin_step(step + 1)
            curriculum.start(step)
            _, prompts, rollouts = source(step, curriculum.limit)
            metrics = rollout_metrics(rollouts) | self.clock.times()
            self.say(rollout_line(step + 1, total, metrics))
            if traced := self.profiler.after(step + 1, metrics, last=step + 1 == total):
                self.say(traced)
            if self.log is not None:
                self.log.record("rollout", step + 1, metrics)
                self.log.record_rollouts(
                    step + 1, rollouts, prompts, self.config.run.readable_rollouts
                )
                self._write_rollouts("rollouts", step + 1, prompts, rollouts)
        self.say(f"done: rollouts in {self.folder / 'rollouts'}")

    def _record_step(
        self,
        step: int,
        total: int,
        metrics: dict[str, float],
        prompts: list[Prompt],
        rollouts: list[Rollout],
    ) -> None:
        every = self.config.evaluation.every
        if step == total or (every and step % every == 0):
            self._evaluate("rl", step, metrics)
        elif self.log is not None:
            self.log.record("rl", step, metrics)
        if self.log is not None:
            self.log.record_rollouts(step, rollouts, prompts, self.config.run.readable_rollouts)
            if self.config.run.record_rollouts:
                self._write_rollouts("rollouts", step, prompts, rollouts)

    def _write_rollouts(
        self, folder: str, step: int, prompts: list[Prompt], rollouts: list[Rollout]
    ) -> Path:
        path = self.folder / folder / f"{step:06d}.parquet"
        if self.mesh.rank == 0:
            write_rollouts(path, step, prompts, rollouts)
        return path

    def _export(self, learner: Learner, name: str) -> None:
        with learner.on_device(weights_alone=True):
            save_hf(learner.stage, self.folder / name, like=self.base)

    def _explain(
        self, error: NonFinite, step: int, prompts: list[Prompt], rollouts: list[Rollout]
    ) -> str:
        """The message of a step that cannot go on; its batch is saved for a replay."""
        if self.replay:
            return f"step {step}: {error}"
        path, back = self._write_rollouts("nonfinite", step, prompts, rollouts), self._way_back()
        message = f"step {step}: {error}. {back} The step's batch is in {path}"
        if list_checkpoints(self.checkpoints) and self.part.source != "recorded":
            message += f": try it with --resume {self.folder} --only train --rollouts {path}"
        return message

    def _way_back(self) -> str:
        self.writer.wait()
        found = list_checkpoints(self.checkpoints)
        if not found:
            return "There is no checkpoint yet; lower the rate and start anew."
        return (
            f"The last good checkpoint is {found[-1]}; lower the rate and --resume {self.folder}."
        )

    def _print_trained(self, what: str, learner: Learner) -> None:
        parts: dict[str, int] = {}
        for name, parameter in learner.stage.named_parameters():
            part = "language"
            if name.startswith("visual."):
                part = "merger" if name.startswith("visual.merger") else "tower"
            parts[part] = parts.get(part, 0) + parameter.requires_grad * parameter.numel()
        counts = ", ".join(f"{part} {count:,}" for part, count in parts.items())
        self.say(f"{what} trains (on this rank): {counts}")

    def close(self) -> None:
        """Stop servers and workers, and finish the folder."""
        if self.engine is not None:
            self.engine.close()
        self.verifier.close()
        if self.log is not None:
            self.log.close()


def check_resume(config: Config, folder: Path) -> None:
    """Raises ConfigError if ``config`` would make the resumed run another one."""
    path = folder / "config.toml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.toml")
    saved = load_config(path)

    def flat(node, where: str = "") -> dict[str, object]:
        result: dict[str, object] = {}
        for item in dataclasses.fields(node):
            value = getattr(node, item.name)
            if dataclasses.is_dataclass(value):
                result |= flat(value, f"{where}{item.name}.")
            else:
                result[f"{where}{item.name}"] = value
        return result

    old, new = flat(saved), flat(config)
    for key, value in new.items():
        if key not in RESUME_MAY_CHANGE and old[key] != value:
            raise ConfigError(
                f"{key} was {old[key]!r} in {folder} and is {value!r} now; a resumed run keeps its "
                "settings (start a new run to change them)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.train",
        description="Train Qwen2.5-VL by the Open Vision Reasoner recipe.",
    )
    parser.add_argument("--config", type=Path, help="TOML file; with --resume, the run's own")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="run folder to go on in")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    parser.add_argument("--only", choices=("rollout", "train"), help="one half of RL")
    parser.add_argument(
        "--rollouts", type=Path, metavar="PATH", help="recorded rollouts for --only train"
    )
    parser.add_argument(
        "--fake-rollouts", type=float, metavar="MEAN_TOKENS",
        help="train on made-up responses of this mean length, to measure; no vLLM",
    )  # fmt: skip
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps, such as 4:6")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.config is None and arguments.resume is None:
        parser.error("--config FILE.toml (or --resume DIR) is needed")
    if arguments.rollouts is not None and arguments.only != "train":
        parser.error("--rollouts goes with --only train")
    if arguments.fake_rollouts is not None:
        if arguments.only == "rollout" or arguments.rollouts is not None:
            parser.error("--fake-rollouts stands alone: it trains on made-up rollouts")
        if arguments.fake_rollouts < 1:
            parser.error("--fake-rollouts: the mean length must be at least 1 token")
        arguments.only = "train"
    if arguments.only == "train" and arguments.rollouts is None and not arguments.fake_rollouts:
        parser.error("--only train needs --rollouts PATH or --fake-rollouts MEAN_TOKENS")
    if arguments.only == "rollout" and arguments.resume is not None:
        parser.error("--only rollout starts a folder of its own; it does not --resume")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    trainer: Trainer | None = None
    try:
        source = arguments.config or arguments.resume / "config.toml"
        config = load_config(source, arguments.overrides)
        if arguments.resume:
            check_resume(config, arguments.resume)
        elif arguments.only:  # a half is RL from model.path
            config = dataclasses.replace(
                config, run=dataclasses.replace(config.run, stages=("rl",))
            )
        if arguments.dry_run:
            shape = read_shape(find_model(config.model.path, published_shape_is_enough=True))
            world = config.parallel.world or int(os.environ.get("WORLD_SIZE", "1"))
            if os.environ.get("RANK", "0") == "0":
                print(describe(config, shape, world))
            return
        trainer = Trainer(
            config,
            resume=arguments.resume,
            part=Part(
                only=arguments.only,
                recorded=arguments.rollouts,
                fake_tokens=arguments.fake_rollouts or 0.0,
            ),
            profile=parse_steps(arguments.profile) if arguments.profile else None,
        )
        trainer.run()
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("OVR_FAST_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        print(
            f"\novr_fast.train (rank {rank}): {type(error).__name__}: {error}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    finally:
        if trainer is not None:
            trainer.close()
        failed = sys.exc_info()[0] is not None
        if dist.is_initialized() and not failed:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


if __name__ == "__main__":
    main()
