"""One full PPO step on fixed rollouts with images, as every layout of ``ranks.py`` does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ovr_fast.config import FROZEN_PARTS, Config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.learner.learner import Learner
from ovr_fast.model.hf_weights import export_hf
from ovr_fast.parallel.checkpoint import CheckpointWriter, copied, read_meta, read_pieces
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.recipe.alone import learn
from ovr_fast.recipe.build import Models
from ovr_fast.recipe.early import EarlyScores
from ovr_fast.records import Prompt, Rollout, RolloutBatch
from ovr_fast.rl.losses import ValueLoss
from ovr_fast.rollout.protocol import Piece, RenderedPrompt, Sample
from ovr_fast.score import encode_conversations
from ovr_fast.shape.model_shape import read_shape
from support.image_run import a_rollout, build, settings

SAMPLES = 4
OBJECTIVES = {
    "grpo": ("rl.normalization=sequence_mean", "rl.kl_coef=0.1", "rl.kl_estimator=k2"),
    "dr_grpo": ("rl.normalization=constant_length", "rl.group_scale=none", "rl.objective=cispo"),
    "gspo": ("rl.normalization=sequence_mean", "rl.objective=gspo"),
}
"""Beside the defaults, all with a group's baseline and two policy steps."""

SHARED = ("rl.share_prefixes=true", "rl.critic_steps=2", "model.train_vision=full")
"""Prompts that stand once; their images' gradients too."""

EARLY = ("rl.score_while_sampling=true", "rl.max_tokens_per_microbatch=340")
"""Responses that are scored when they are there."""


def rollouts_of(folder: Path, conversations: Path, *, seed: int = 0) -> RolloutBatch:
    """Random responses of uneven length to the test conversations, with random rewards."""
    chat = ChatTemplate(folder, image_token_id=read_shape(folder).image_token_id)
    rng = np.random.default_rng(seed)
    prompts, rollouts = [], []
    for index, sequence in enumerate(encode_conversations(conversations, chat)):
        prompts.append(
            Prompt(
                id=str(index),
                data_source="test",
                messages=(),
                images=sequence.images,
                answer="",
                response=None,
            )
        )
        for sample in range(SAMPLES):
            length = int(rng.integers(3, 40))
            rollouts.append(
                a_rollout(
                    index,
                    sample,
                    sequence.tokens,
                    rng.integers(0, 60, length),
                    logprobs=rng.normal(-4, 1, length).astype(np.float32),
                    reward=float(rng.integers(2)),
                )
            )
    return RolloutBatch(step=1, prompts=tuple(prompts), rollouts=tuple(rollouts))


def scored_early(
    models: Models, config: Config, batch: RolloutBatch, *, order: Sequence[int]
) -> tuple[RolloutBatch, int]:
    """The batch as if its responses had ended in ``order``, scored as the settings ask for; and how
    many turns that took before the last of them. A collective."""
    scoring, mesh = EarlyScores.of(models, config), models.mesh
    assert scoring is not None
    samples, turns = samples_of(batch) if mesh.rank == 0 else [], 0
    for place in order:
        if mesh.rank == 0:
            finish(samples[place], batch.rollouts[place])
        if mesh.from_first_rank(lambda: scoring.wants(samples)):
            scoring.turn(samples)
            turns += 1
    known = scoring.finish(samples)
    if mesh.rank:
        return batch, turns
    rollouts = [replace(r, known=k) for r, k in zip(batch.rollouts, known, strict=True)]
    return replace(batch, rollouts=tuple(rollouts)), turns


def samples_of(batch: RolloutBatch) -> list[Sample]:
    """What would have been asked for."""
    return [
        Sample(
            asked=RenderedPrompt(
                index=rollout.prompt_index,
                prompt=batch.prompt_of(rollout),
                placed=[],
                expanded=rollout.prompt_tokens,
            ),
            step=batch.step,
            number=rollout.sample_index,
            seed=0,
            max_tokens=len(rollout.response_tokens),
        )
        for rollout in batch.rollouts
    ]


def finish(sample: Sample, rollout: Rollout) -> None:
    """The sample's response is this one."""
    sample.pieces = [
        Piece(
            tokens=rollout.response_tokens.astype(np.int32),
            logprobs=rollout.rollout_logprobs,
            versions=rollout.versions,
            finish_reason="stop",
            text="",
        )
    ]


def config_of(folder: Path, *overrides: str, lr: float = 0.0) -> Config:
    longest = ["rl.max_prompt_tokens=300", "rl.max_response_tokens=40"]
    return settings(folder, *longest, "rl.max_tokens_per_microbatch=700", *overrides, lr=lr)


def gradients_of_a_step(
    models: Models, config: Config, batch: RolloutBatch
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics, and the whole gradient of every minibatch under Hugging Face names. The rate is 0,
    so that all minibatches see the same weights."""
    found: dict[str, torch.Tensor] = {}

    def recorded(learner: Learner) -> None:
        update, turns = learner.update, []

        def update_and_record(minibatch, loss):
            unheard = replace(loss, seen=None) if isinstance(loss, ValueLoss) else loss
            gradients = learner.gradients(minibatch, unheard)
            turn = f"{learner.name}/{len(turns)}"
            turns.append(turn)
            frozen = FROZEN_PARTS[config.model.train_vision]
            for name, value in export_hf(learner.model, skip_parts=frozen, values=gradients):
                found[f"{turn}/{name}"] = value.clone()
            return update(minibatch, loss)

        learner.update = update_and_record

    recorded(models.actor)
    if models.critic is not None:
        recorded(models.critic)
    return learn(models, config, batch), found


def restore(models: Models, path: Path, mesh: Mesh) -> None:
    learners = models.actor, models.critic
    read_pieces(path, [piece for learner in learners for piece in learner.pieces()], mesh)
    for learner in learners:
        learner.restored(read_meta(path)["learner_steps"][learner.name])


def run(folders: Path, mesh: Mesh, checkpoints: Path, name: str) -> dict:
    """Gradients of a step; a step, saved; the next step; the next step of what ``one`` saved."""
    folder = folders / "wide"
    batch = rollouts_of(folder, folders / "conversations" / "conversations.jsonl")
    still = config_of(folder)
    metrics, gradients = gradients_of_a_step(build(folder, still, mesh), still, batch)
    found = {"metrics": metrics, "gradients": gradients, "objectives": {}}
    for objective, words in OBJECTIVES.items():
        still = config_of(folder, "rl.advantage=group", "rl.policy_steps=2", *words)
        metrics, gradients = gradients_of_a_step(build(folder, still, mesh), still, batch)
        found["objectives"][objective] = {"metrics": metrics, "gradients": gradients}
    still = config_of(folder, *SHARED)
    metrics, gradients = gradients_of_a_step(build(folder, still, mesh), still, batch)
    found["shared"] = {"metrics": metrics, "gradients": gradients}
    still = config_of(folder, *EARLY)
    models = build(folder, still, mesh)
    scored, _ = scored_early(models, still, batch, order=range(len(batch.rollouts)))
    metrics, gradients = gradients_of_a_step(models, still, scored)
    found["early"] = {"metrics": metrics, "gradients": gradients}
    config = config_of(folder, lr=1e-3)
    models = build(folder, config, mesh)
    learn(models, config, batch)
    writer = CheckpointWriter(checkpoints / name, mesh, keep=1)
    learners = models.actor, models.critic
    writer.save(
        "rl",
        1,
        [copied(piece) for learner in learners for piece in learner.pieces()],
        {"learner_steps": {learner.name: learner.steps_done for learner in learners}},
    )
    second = replace(batch, step=2)
    found["next"] = learn(models, config, second)  # while it is being written
    writer.wait()
    if (checkpoints / "one").exists():
        models = build(folder, config, mesh)
        restore(models, checkpoints / "one" / "rl-000001", mesh)
        found["after_one"] = learn(models, config, second)
    found["weights_after_next"] = {
        f"{learner.name}/{name}": tensor.clone()
        for learner in (models.actor, models.critic)
        for name, tensor in export_hf(learner.model)
    }
    return found


def permuted(batch: RolloutBatch) -> RolloutBatch:
    """The same rollouts in another order."""
    order = np.random.default_rng(1).permutation(len(batch.rollouts))
    return replace(batch, rollouts=tuple(batch.rollouts[index] for index in order))
