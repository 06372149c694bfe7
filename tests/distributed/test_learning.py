"""Does it learn? Gradients against plain autograd, and PPO on a task small enough to solve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ovr_fast.config import Config, ModelConfig, OptimizerConfig
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.packing import pack
from ovr_fast.learner.learner import Learner
from ovr_fast.learner.passes import build_model
from ovr_fast.model import qwen25_vl
from ovr_fast.model.hf_weights import export_hf
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.parallel.schedule import forward_only
from ovr_fast.recipe.alone import learn
from ovr_fast.recipe.build import Models, build_ppo
from ovr_fast.records import Microbatch, Minibatch, Prompt, RolloutBatch, Sequence
from ovr_fast.rl.losses import cross_entropy_loss
from ovr_fast.score import encode_conversations
from ovr_fast.shape.model_shape import read_shape
from ovr_kernels import fused, reference
from ovr_kernels.parity import relative_error
from support.image_run import a_rollout, lone_mesh, settings
from support.random_models import make_conversations, make_model, transformers_gradients

PROMPTS, SAMPLES, LENGTH = 2, 48, 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "wide"])
def test_gradients_agree_with_transformers(name: str, tmp_path: Path) -> None:
    """The mean cross-entropy of all conversations, packed in several microbatches."""
    folder = make_model(tmp_path / name, name)
    conversations = make_conversations(tmp_path / "conversations")
    shape, mesh = read_shape(folder), lone_mesh()
    chat = ChatTemplate(folder, image_token_id=shape.image_token_id)
    sequences = encode_conversations(conversations, chat)
    batches = pack(sequences, positions=chat.mrope_cache(), max_tokens=260)
    assert len(batches) > 1
    options = ModelConfig(path="-", dtype="float32", train_vision="full")
    model = build_model(shape, mesh, options, weights=folder)
    vision = VisionEncoder(model.visual, shape.vision, mesh, chat.image_processor)
    learner = Learner("test", model, vision, OptimizerConfig())
    minibatch = Minibatch(
        microbatches=tuple(batches),
        targets=(None,) * len(batches),
        global_tokens=sum(sequence.response_length for sequence in sequences),
    )
    gradients = learner.gradients(minibatch, cross_entropy_loss)
    ours = {n: t.clone() for n, t in export_hf(learner.model, values=gradients)}
    theirs = transformers_gradients(folder, conversations)
    assert set(ours) == set(theirs)
    for key, expected in theirs.items():
        error = (ours[key] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= 1e-4, f"{key}: relative error {error:.1e}"


def sample(models: Models, tokens: list[np.ndarray], generator: torch.Generator) -> RolloutBatch:
    """Responses of ``LENGTH`` tokens from the actor itself; reward 1 where the first token's
    parity is that of the prompt's index."""
    model = models.actor.model

    def logits(hidden_RH: Tensor, batch: Microbatch) -> Tensor:
        return (hidden_RH @ model.output_weight.T).flatten()

    sequences = [prompt for prompt in tokens for _ in range(SAMPLES)]
    logprobs: list[Tensor] = []
    for _ in range(LENGTH):
        asked = [
            Sequence.unsampled(np.append(row, 0), response_start=len(row), images=(), name="")
            for row in sequences
        ]
        batches = pack(asked, positions=models.chat.mrope_cache(), max_tokens=100_000)
        assert len(batches) == 1
        (flat,) = forward_only(model, models.mesh, batches, logits)
        distribution = F.log_softmax(flat.view(len(sequences), -1).float(), dim=-1)
        chosen = torch.multinomial(distribution.exp(), 1, generator=generator)
        logprobs.append(distribution.gather(1, chosen)[:, 0])
        drawn = zip(sequences, chosen[:, 0].tolist(), strict=True)
        sequences = [np.append(row, token) for row, token in drawn]
    sampled = torch.stack(logprobs, dim=1).numpy()
    rollouts = []
    for index, row in enumerate(sequences):
        prompt, number = divmod(index, SAMPLES)
        right = row[-LENGTH] % 2 == prompt % 2
        rollouts.append(
            a_rollout(
                prompt, number, tokens[prompt], row[-LENGTH:], reward=float(right),
                logprobs=sampled[index],
            )
        )  # fmt: skip
    prompts = tuple(
        Prompt(id=str(i), data_source="bandit", messages=(), images=(), answer="", response=None)
        for i in range(PROMPTS)
    )
    return RolloutBatch(step=1, prompts=prompts, rollouts=tuple(rollouts))


def text_only_models(folder: Path) -> tuple[Models, Config]:
    """Actor and critic of a random model; every token may be said."""
    make_model(folder, "wide")
    config = settings(folder, lr=2e-3)
    chat = ChatTemplate(folder, image_token_id=-1)
    mesh = lone_mesh()
    return build_ppo(config, read_shape(folder), mesh, chat, weights=folder), config


def bandit_tokens() -> list[np.ndarray]:
    return [np.array([5, 30 + i, 7, 9], dtype=np.int64) for i in range(PROMPTS)]


@pytest.mark.slow
def test_ppo_solves_a_contextual_bandit(tmp_path: Path) -> None:
    """A random model learns to begin its answer to one prompt with a token of even id, to the
    other of odd id, and the log-prob gap stays at rounding."""
    models, config = text_only_models(tmp_path / "model")
    tokens, generator = bandit_tokens(), torch.Generator().manual_seed(0)
    history = [
        learn(models, config, replace(sample(models, tokens, generator), step=step))
        for step in range(1, 41)
    ]
    rewards = [metrics["rollout/reward"] for metrics in history]
    assert all(metrics["rollout/logprob_gap"] < 1e-5 for metrics in history)
    assert np.mean(rewards[:3]) < 0.6
    assert np.mean(rewards[-5:]) > 0.9, rewards


@pytest.mark.slow
def test_critic_learns_what_a_prompt_is_worth(tmp_path: Path) -> None:
    """Where one prompt always earns 1 and the other 0, values explain the returns."""
    models, config = text_only_models(tmp_path / "model")
    tokens, generator = bandit_tokens(), torch.Generator().manual_seed(0)
    for step in range(1, 9):
        batch = sample(models, tokens, generator)
        rollouts = tuple(replace(r, reward=float(r.prompt_index)) for r in batch.rollouts)
        metrics = learn(models, config, replace(batch, step=step, rollouts=rollouts))
    assert metrics["critic/explained_variance"] > 0.9


@pytest.mark.slow
def test_triton_operators_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps with every operator as an interpreted Triton kernel: same rewards, same
    weights up to float32."""
    tokens, generator = bandit_tokens(), torch.Generator().manual_seed(0)
    teacher, _ = text_only_models(tmp_path / "teacher")
    batch = sample(teacher, tokens, generator)
    batch = replace(batch, rollouts=batch.rollouts[:: SAMPLES // 4])  # four of each prompt
    results = []
    for operators in (reference, fused):
        monkeypatch.setattr(qwen25_vl, "operators_for", lambda *_, chosen=operators: chosen)
        models, config = text_only_models(tmp_path / operators.__name__)
        metrics = [learn(models, config, replace(batch, step=step)) for step in (1, 2)]
        results.append((metrics, dict(models.actor.model.named_parameters())))
    (plain, weights), (triton, found) = results
    for a, b in zip(plain, triton, strict=True):
        for name in a:
            if name.startswith("time/"):
                continue
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    # By norm, and far under a step's 2 %: a key's bias has no gradient but rounding, which Adam
    # turns into steps.
    for name, weight in weights.items():
        assert relative_error(found[name], weight) <= 1e-3, name
