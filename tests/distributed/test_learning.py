"""Does it learn? Gradients against plain autograd, and PPO on a task small enough to solve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import ROOT
from ovr_fast.batch import PackedBatch, Prompt, Rollout, Sequence
from ovr_fast.config import ModelConfig, OptimizerConfig, load_config
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.packing import PositionTable, pack
from ovr_fast.learner import Learner, build_stage, cross_entropy_head
from ovr_fast.model import qwen25_vl
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.hf_weights import export_hf
from ovr_fast.model.shape import read_shape
from ovr_fast.observe.clock import Clock
from ovr_fast.parallel.mesh import start_mesh
from ovr_fast.parallel.schedule import forward_only
from ovr_fast.ppo import PPO
from ovr_fast.rl.losses import cold_start_loss
from ovr_fast.score import encode_conversations
from ovr_kernels import fused, reference
from ovr_kernels.parity import relative_error
from random_models import make_conversations, make_model, transformers_gradients

PROMPTS, SAMPLES, LENGTH = 2, 48, 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "wide"])
def test_gradients_agree_with_transformers(name: str, tmp_path: Path) -> None:
    """The mean cross-entropy of all conversations, packed in several microbatches."""
    folder = make_model(tmp_path / name, name)
    conversations = make_conversations(tmp_path / "conversations")
    shape, mesh = read_shape(folder), start_mesh(tensor=1, pipeline=1)
    encoder = ChatEncoder(folder, image_token_id=shape.image_token_id)
    sequences = encode_conversations(conversations, encoder)
    batches = pack(
        sequences,
        list(range(len(sequences))),
        positions=PositionTable(encoder.pictures, shape.image_token_id),
        max_tokens=260,
    )
    assert len(batches) > 1
    settings = ModelConfig(path="-", dtype="float32", train_vision="full")
    stage = build_stage(shape, mesh, settings, weights=folder)
    pictures = PictureEncoder(stage.visual, shape.vision, mesh, encoder.pictures)
    learner = Learner("test", stage, pictures, OptimizerConfig())
    total = sum(sequence.response_length for sequence in sequences)

    def loss(rows_RH: Tensor, batch: PackedBatch):
        head = cross_entropy_head(learner.stage, rows_RH, batch)
        return cold_start_loss(head, batch, global_tokens=total)

    gradients = learner.gradients(batches, loss)
    ours = {n: t.clone() for n, t in export_hf(learner.stage, values=gradients)}
    theirs = transformers_gradients(folder, conversations)
    assert set(ours) == set(theirs)
    for key, expected in theirs.items():
        error = (ours[key] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= 1e-4, f"{key}: relative error {error:.1e}"


def sample(ppo: PPO, prompts: list[np.ndarray], generator: torch.Generator) -> list[Rollout]:
    """Responses of ``LENGTH`` tokens from the actor itself; reward 1 where the first token's
    parity is that of the prompt's index."""
    stage = ppo.actor.stage

    def logits(rows_RH: Tensor, batch: PackedBatch) -> Tensor:
        return (rows_RH @ stage.output_weight.T).flatten()

    sequences = [tokens for tokens in prompts for _ in range(SAMPLES)]
    logprobs: list[Tensor] = []
    for _ in range(LENGTH):
        asked = [
            Sequence(tokens=np.append(tokens, 0), response_start=len(tokens), pictures=())
            for tokens in sequences
        ]
        batches = pack(
            asked,
            list(range(len(asked))),
            positions=PositionTable(ppo.encoder.pictures, ppo.encoder.image_token_id),
            max_tokens=100_000,
        )
        assert len(batches) == 1
        (flat,) = forward_only(stage, ppo.mesh, batches, logits)
        distribution = F.log_softmax(flat.view(len(sequences), -1).float(), dim=-1)
        chosen = torch.multinomial(distribution.exp(), 1, generator=generator)
        logprobs.append(distribution.gather(1, chosen)[:, 0])
        drawn = zip(sequences, chosen[:, 0].tolist(), strict=True)
        sequences = [np.append(tokens, token) for tokens, token in drawn]
    sampled = torch.stack(logprobs, dim=1).numpy()
    rollouts = []
    for index, tokens in enumerate(sequences):
        prompt, number = divmod(index, SAMPLES)
        right = tokens[-LENGTH] % 2 == prompt % 2
        rollouts.append(
            Rollout(
                prompt_index=prompt,
                sample_index=number,
                prompt_tokens=prompts[prompt],
                response_tokens=tokens[-LENGTH:],
                rollout_logprobs=sampled[index],
                text="",
                finish_reason="stop",
                policy_version=0,
                reward=float(right),
                outcome="correct" if right else "wrong",
            )
        )
    return rollouts


def text_only_ppo(folder: Path) -> PPO:
    """Actor and critic of a random model, without an engine; every token may be said."""
    make_model(folder, "wide")
    shape, mesh = read_shape(folder), start_mesh(tensor=1, pipeline=1)
    config = load_config(ROOT / "configs" / "tiny.toml", [f"model.path={folder}"])
    optimizer = OptimizerConfig(lr=2e-3)

    encoder = ChatEncoder(folder, image_token_id=-1)

    def learner(name: str, **options) -> Learner:
        stage = build_stage(shape, mesh, config.model, weights=folder, **options)
        pictures = PictureEncoder(stage.visual, shape.vision, mesh, encoder.pictures)
        return Learner(name, stage, pictures, optimizer)

    return PPO(
        config=config,
        mesh=mesh,
        actor=learner("actor"),
        critic=learner("critic", value_head=True),
        reference=None,
        reference_encoder=None,
        engine=None,
        encoder=encoder,
        clock=Clock(),
    )


def bandit_prompts() -> tuple[list[np.ndarray], list[Prompt]]:
    tokens = [np.array([5, 30 + i, 7, 9], dtype=np.int64) for i in range(PROMPTS)]
    return tokens, [
        Prompt(id=str(i), source="bandit", messages=(), pictures=(), answer="", response=None)
        for i in range(PROMPTS)
    ]


@pytest.mark.slow
def test_ppo_solves_a_contextual_bandit(tmp_path: Path) -> None:
    """A random model learns to begin its answer to one prompt with a token of even id, to the
    other of odd id, and the log-prob gap stays at rounding."""
    ppo = text_only_ppo(tmp_path / "model")
    tokens, prompts = bandit_prompts()
    generator = torch.Generator().manual_seed(0)
    history = [ppo.learn(i, prompts, sample(ppo, tokens, generator)) for i in range(40)]
    rewards = [metrics["rollout/reward"] for metrics in history]
    assert all(metrics["rollout/logprob_gap"] < 1e-5 for metrics in history)
    assert np.mean(rewards[:3]) < 0.6
    assert np.mean(rewards[-5:]) > 0.9, rewards


@pytest.mark.slow
def test_critic_learns_what_a_prompt_is_worth(tmp_path: Path) -> None:
    """Where one prompt always earns 1 and the other 0, values explain the returns."""
    ppo = text_only_ppo(tmp_path / "model")
    tokens, prompts = bandit_prompts()
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        rollouts = [
            replace(r, reward=float(r.prompt_index)) for r in sample(ppo, tokens, generator)
        ]
        explained = ppo.learn(step, prompts, rollouts)["critic/explained_variance"]
    assert explained > 0.9


@pytest.mark.slow
def test_triton_operators_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps with every operator as an interpreted Triton kernel: same rewards, same
    weights up to float32."""
    tokens, prompts = bandit_prompts()
    generator = torch.Generator().manual_seed(0)
    teacher = text_only_ppo(tmp_path / "teacher")
    rollouts = sample(teacher, tokens, generator)[:: SAMPLES // 4]  # four of each prompt
    results = []
    for operators in (reference, fused):
        monkeypatch.setattr(qwen25_vl, "operators_for", lambda *_, chosen=operators: chosen)
        ppo = text_only_ppo(tmp_path / operators.__name__)
        metrics = [ppo.learn(step, prompts, rollouts) for step in range(2)]
        results.append((metrics, dict(ppo.actor.stage.named_parameters())))
    (plain, weights), (triton, found) = results
    for a, b in zip(plain, triton, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    # By norm, and far under a step's 2 %: a key's bias has no gradient but rounding, which Adam
    # turns into steps.
    for name, weight in weights.items():
        assert relative_error(found[name], weight) <= 1e-3, name
