"""One full PPO step on fixed rollouts with pictures, as every layout of ``ranks.py`` does it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ovr_fast.batch import Prompt, Rollout
from ovr_fast.config import FROZEN_PARTS, OptimizerConfig, load_config
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.learner import Learner, build_stage
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.hf_weights import export_hf
from ovr_fast.model.shape import read_shape
from ovr_fast.observe.clock import Clock
from ovr_fast.parallel.checkpoint import CheckpointWriter, copied, read_meta, read_pieces
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.ppo import PPO
from ovr_fast.score import encode_conversations

SAMPLES = 4
TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"


def rollouts_of(
    folder: Path, conversations: Path, *, seed: int = 0
) -> tuple[list[Prompt], list[Rollout]]:
    """Random responses of uneven length to the test conversations, with random rewards."""
    encoder = ChatEncoder(folder, image_token_id=read_shape(folder).image_token_id)
    rng = np.random.default_rng(seed)
    prompts, rollouts = [], []
    for index, sequence in enumerate(encode_conversations(conversations, encoder)):
        prompts.append(
            Prompt(
                id=str(index),
                source="test",
                messages=(),
                pictures=sequence.pictures,
                answer="",
                response=None,
            )
        )
        for sample in range(SAMPLES):
            length = int(rng.integers(3, 40))
            rollouts.append(
                Rollout(
                    prompt_index=index,
                    sample_index=sample,
                    prompt_tokens=sequence.tokens,
                    response_tokens=rng.integers(0, 60, length),
                    rollout_logprobs=rng.normal(-4, 1, length).astype(np.float32),
                    text="",
                    finish_reason="stop",
                    policy_version=0,
                    reward=float(rng.integers(2)),
                    outcome="wrong",
                )
            )
    return prompts, rollouts


def build(folder: Path, mesh: Mesh, *settings: str, lr: float = 0.0) -> PPO:
    """Actor and critic, without an engine."""
    shape = read_shape(folder)
    longest = ["rl.max_prompt_tokens=300", "rl.max_response_tokens=40"]
    overrides = [f"model.path={folder}", *longest, "rl.max_tokens_per_microbatch=700", *settings]
    config = load_config(TINY, overrides)
    encoder = ChatEncoder(folder, image_token_id=shape.image_token_id)

    def learner(name: str, **options) -> Learner:
        stage = build_stage(shape, mesh, config.model, weights=folder, **options)
        pictures = PictureEncoder(stage.visual, shape.vision, mesh, encoder.pictures)
        optimizer = OptimizerConfig(lr=lr)
        return Learner(name, stage, pictures, optimizer, offload=config.parallel.offload)

    return PPO(
        config=config,
        mesh=mesh,
        actor=learner("actor"),
        critic=learner("critic", value_head=True, seed=3),
        reference=None,
        reference_encoder=None,
        engine=None,
        encoder=encoder,
        clock=Clock(),
    )


def gradients_of_a_step(
    ppo: PPO, prompts: list[Prompt], rollouts: list[Rollout]
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics, and the whole gradient of every minibatch under Hugging Face names. The rate is 0,
    so that all minibatches see the same weights."""
    found: dict[str, torch.Tensor] = {}

    def recorded(learner: Learner):
        update, turns = learner.update, []

        def update_and_record(batches, loss):
            gradients = learner.gradients(batches, loss)
            turn = f"{learner.name}/{len(turns)}"
            turns.append(turn)
            frozen = FROZEN_PARTS[ppo.config.model.train_vision]
            for name, value in export_hf(learner.stage, skip_parts=frozen, values=gradients):
                found[f"{turn}/{name}"] = value.clone()
            return update(batches, loss)

        learner.update = update_and_record

    recorded(ppo.actor)
    recorded(ppo.critic)
    return ppo.learn(0, prompts, rollouts), found


def restore(ppo: PPO, path: Path, mesh: Mesh) -> None:
    learners = ppo.actor, ppo.critic
    read_pieces(path, [piece for learner in learners for piece in learner.pieces()], mesh)
    for learner in learners:
        learner.restored(read_meta(path)["learner_steps"][learner.name])


def run(models: Path, mesh: Mesh, checkpoints: Path, name: str) -> dict:
    """Gradients of a step; a step, saved; the next step; the next step of what ``one`` saved."""
    folder = models / "wide"
    prompts, rollouts = rollouts_of(folder, models / "conversations" / "conversations.jsonl")
    metrics, gradients = gradients_of_a_step(build(folder, mesh), prompts, rollouts)
    found = {"metrics": metrics, "gradients": gradients}
    ppo = build(folder, mesh, lr=1e-3)
    ppo.learn(0, prompts, rollouts)
    writer = CheckpointWriter(checkpoints / name, mesh, keep=1)
    learners = ppo.actor, ppo.critic
    writer.save(
        "rl",
        1,
        [copied(piece) for learner in learners for piece in learner.pieces()],
        {"learner_steps": {learner.name: learner.steps_done for learner in learners}},
    )
    found["next"] = ppo.learn(1, prompts, rollouts)  # while it is being written
    writer.wait()
    if (checkpoints / "one").exists():
        again = build(folder, mesh, lr=1e-3)
        restore(again, checkpoints / "one" / "rl-000001", mesh)
        found["after_one"] = again.learn(1, prompts, rollouts)
        ppo = again
    found["weights_after_next"] = {
        f"{learner.name}/{name}": tensor.clone()
        for learner in (ppo.actor, ppo.critic)
        for name, tensor in export_hf(learner.stage)
    }
    return found


def permuted(rollouts: list[Rollout]) -> list[Rollout]:
    order = np.random.default_rng(1).permutation(len(rollouts))
    return [replace(rollouts[index]) for index in order]
