"""Every objective, advantage and normalisation that a setting reaches, against PyTorch in float64
written from the papers' formulas: the gradient of the second update of a step, on weights that the
first has moved, packed with images."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import step_ranks
from ovr_fast.config import Config, ConfigError, RLConfig, load_config
from ovr_fast.model.hf_weights import export_hf
from ovr_fast.plan.flops import ppo_passes
from ovr_fast.plan.memory import memory_plan
from ovr_fast.recipe.alone import learn
from ovr_fast.recipe.ppo import compute_targets
from ovr_fast.recipe.shards import pack_shard
from ovr_fast.records import Minibatch, Rollout, RolloutBatch
from ovr_fast.rl.advantages import group_advantages
from ovr_fast.shape.model_shape import read_shape
from support.image_run import build, settings
from support.toy_run import BASE_MODEL, ROOT

GROUP = ("rl.advantage=group", "rl.normalize_advantages=false", "rl.policy_steps=2")
TEMPERATURE = 0.8


def group_of(batch: RolloutBatch, rollout: Rollout) -> list[float]:
    return [r.reward for r in batch.rollouts if r.prompt_index == rollout.prompt_index]


def grpo(own: float, rewards: list[float]) -> float:
    return (own - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-6)


def dr_grpo(own: float, rewards: list[float]) -> float:
    return own - np.mean(rewards)


def rloo(own: float, rewards: list[float]) -> float:
    return own - (sum(rewards) - own) / (len(rewards) - 1)


Term = Callable[[float, Tensor, Tensor, Tensor], Tensor]
"""From advantage, new, old and rollout log-probs of a response to the loss of its tokens."""


def ppo(low: float, high: float, dual: float = 0.0) -> Term:
    def term(a: float, new: Tensor, old: Tensor, rollout: Tensor) -> Tensor:
        ratio = (new - old).exp()
        gain = torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
        return -(torch.max(gain, torch.tensor(dual * a)) if dual and a < 0 else gain)

    return term


def cispo(a: float, new: Tensor, old: Tensor, rollout: Tensor) -> Tensor:
    return -(new - old).exp().clamp(0.8, 1.28).detach() * a * new


def reinforce(a: float, new: Tensor, old: Tensor, rollout: Tensor) -> Tensor:
    return -a * new


def gspo(a: float, new: Tensor, old: Tensor, rollout: Tensor) -> Tensor:
    """Spread over the response's tokens, whose mean it is."""
    ratio = (new - old).mean().exp()
    gain = torch.min(ratio * a, ratio.clamp(1 - 0.05, 1 + 0.06) * a)
    return -gain.expand(len(new))


def truncated(a: float, new: Tensor, old: Tensor, rollout: Tensor) -> Tensor:
    weight = (old - rollout).exp().clamp(max=1.5).detach()
    return ppo(0.2, 0.2)(a, new, old, rollout) * weight


def with_kl(estimator: str) -> Term:
    def term(a: float, new: Tensor, old: Tensor, rollout: Tensor) -> Tensor:
        d = old - new  # the reference has the weights from before the step
        kl = 0.5 * d**2 if estimator == "k2" else d.exp() - d - 1
        return ppo(0.2, 0.2)(a, new, old, rollout) + 0.5 * kl

    return term


CASES: dict[str, tuple[tuple[str, ...], Any, Term, str]] = {
    "GRPO": (("rl.normalization=sequence_mean",), grpo, ppo(0.2, 0.2), "sequence"),
    "Dr. GRPO": (
        ("rl.group_scale=none", "rl.normalization=constant_length"),
        dr_grpo, ppo(0.2, 0.2), "length",
    ),
    "RLOO": (
        ("rl.group_scale=none", "rl.group_baseline=leave_one_out", "rl.objective=reinforce"),
        rloo, reinforce, "token",
    ),
    "DAPO": (("rl.clip_eps=0.02", "rl.clip_eps_high=0.05"), grpo, ppo(0.02, 0.05), "token"),
    "dual clip": (("rl.dual_clip=1.02", "rl.clip_eps=0.9"), grpo, ppo(0.9, 0.9, 1.02), "token"),
    "CISPO": (("rl.objective=cispo", "rl.clip_eps_high=0.28"), grpo, cispo, "token"),
    "GSPO": (
        ("rl.objective=gspo", "rl.normalization=sequence_mean", "rl.clip_eps=0.05",
         "rl.clip_eps_high=0.06"), grpo, gspo, "sequence",
    ),
    "importance": (("rl.importance_cap=1.5",), grpo, truncated, "token"),
    "k2": (("rl.kl_coef=0.5", "rl.kl_estimator=k2"), grpo, with_kl("k2"), "token"),
    "k3": (("rl.kl_coef=0.5",), grpo, with_kl("k3"), "token"),
}  # fmt: skip


class Policy:
    """transformers' model in float64, and log-probs of a rollout by it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration

        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
        self.processor = AutoImageProcessor.from_pretrained(folder)

    def logprobs(self, batch: RolloutBatch, rollout: Rollout) -> Tensor:
        ids = torch.from_numpy(np.concatenate([rollout.prompt_tokens, rollout.response_tokens]))
        images = [Image.open(io.BytesIO(image.data)) for image in batch.prompt_of(rollout).images]
        vision = dict(self.processor(images=images, return_tensors="pt")) if images else {}
        logits = self.model(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None],
            mm_token_type_ids=(ids == self.model.config.image_token_id).int()[None], **vision,
        ).logits[0]  # fmt: skip
        start = len(rollout.prompt_tokens)
        logs = (logits[start - 1 : -1] / TEMPERATURE).log_softmax(-1)
        return logs.gather(1, ids[start:, None])[:, 0]

    def gradients(self, folder: Path) -> dict[str, Tensor]:
        """By the names on disk."""
        from safetensors.torch import load_file

        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
        self.model.save_pretrained(folder)  # saving translates the names
        return load_file(folder / "model.safetensors")


def members(minibatch: Minibatch, batch: RolloutBatch) -> list[Rollout]:
    """The rollouts of a minibatch, by their tokens, which are random."""
    by_tokens = {tuple(r.response_tokens.tolist()): r for r in batch.rollouts}
    found = []
    for microbatch in minibatch.microbatches:
        parts = microbatch.labels_R.split(list(microbatch.responses.lengths))
        found += [by_tokens[tuple(part.tolist())] for part in parts]
    return found


def second_update(
    config: Config, folder: Path, batch: RolloutBatch, place: Path
) -> tuple[dict[str, Tensor], Minibatch, Path, dict[str, float]]:
    """Its gradients, its minibatch, and a folder with the weights that it starts from."""
    models = build(folder, config)
    actor, update, turns = models.actor, models.actor.update, []
    kept: list[Any] = []

    def recorded(minibatch: Minibatch, loss: Any) -> dict[str, float]:
        turns.append(minibatch)
        if len(turns) == 2:
            weights = {name: tensor.clone() for name, tensor in export_hf(actor.model)}
            gradients = actor.gradients(minibatch, loss)
            kept.append({n: t.clone() for n, t in export_hf(actor.model, values=gradients)})
            for path in folder.iterdir():
                if path.is_file() and path.name != "model.safetensors":
                    (place / path.name).write_bytes(path.read_bytes())
            save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        return update(minibatch, loss)

    actor.update = recorded
    metrics = learn(models, config, batch)
    return kept[0], turns[1], place, metrics


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_the_gradient_is_the_formula_s(case: str, models: Path, tmp_path: Path) -> None:
    words, advantage, term, by = CASES[case]
    folder = models / "wide"
    batch = step_ranks.rollouts_of(folder, models / "conversations" / "conversations.jsonl")
    config = step_ranks.config_of(
        folder, *GROUP, *words, f"rollout.temperature={TEMPERATURE}", "model.train_vision=full",
        lr=1e-3,
    )  # fmt: skip
    place = tmp_path / "moved"
    place.mkdir()
    found, minibatch, moved, metrics = second_update(config, folder, batch, place)
    assert "critic/loss" not in metrics
    before, now = Policy(folder), Policy(moved)
    chosen = members(minibatch, batch)
    tokens = sum(len(r.response_tokens) for r in chosen)
    assert (minibatch.global_tokens, minibatch.global_responses) == (tokens, len(chosen))
    outside = 0
    for rollout in chosen:
        with torch.no_grad():
            old = before.logprobs(batch, rollout)
        new = now.logprobs(batch, rollout)
        a = advantage(rollout.reward, group_of(batch, rollout))
        sampled = torch.from_numpy(rollout.rollout_logprobs).double()
        loss = term(a, new, old, sampled)
        outside += int(((new - old).exp() - 1).abs().gt(0.02).sum())
        length = len(rollout.response_tokens)
        share = {"token": 1 / tokens, "sequence": 1 / (len(chosen) * length),
                 "length": 1 / (len(chosen) * config.rl.max_response_tokens)}[by]  # fmt: skip
        (loss.sum() * share).backward()
    assert outside > tokens / 10  # or nothing was clipped
    expected = now.gradients(tmp_path / "gradients")
    assert set(found) == set(expected)
    whole = torch.cat([tensor.flatten().double() for tensor in expected.values()])
    ours = torch.cat([found[name].flatten().double() for name in expected])
    assert float((ours - whole).norm() / whole.norm()) <= 1e-4


def test_group_advantages_by_hand() -> None:
    rewards, groups = [1.0, 0.0, 0.0, 2.0, 2.0], [0, 0, 0, 1, 1]
    third = 1 / 3
    assert group_advantages(rewards, groups, baseline="mean", scale="none") == pytest.approx(
        [2 * third, -third, -third, 0.0, 0.0]
    )
    assert group_advantages(
        rewards, groups, baseline="leave_one_out", scale="none"
    ) == pytest.approx([1.0, -0.5, -0.5, 0.0, 0.0])
    assert group_advantages(rewards, groups, baseline="mean", scale="deviation") == pytest.approx(
        [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5, 0.0, 0.0], rel=1e-5
    )
    with pytest.raises(ValueError, match="group 1 has one response"):
        group_advantages([1.0, 0.0, 1.0], [0, 0, 1], baseline="mean", scale="none")


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_in_the_reward_is_paid_token_by_token(estimator: str, models: Path) -> None:
    """With lambda 1 the return is the reward to go, less the weight times what is still to pay."""
    folder = models / "wide"
    batch = step_ranks.rollouts_of(folder, models / "conversations" / "conversations.jsonl")
    config = step_ranks.config_of(
        folder, "rl.kl_coef=0.1", "rl.kl_in=reward", f"rl.kl_estimator={estimator}",
        "rl.normalize_advantages=false", lr=1e-3,
    )  # fmt: skip
    wired = build(folder, config)
    learn(wired, config, batch)  # away from the reference
    shard = pack_shard(batch, wired, config)
    temperature = config.rollout.temperature
    old = wired.actor.logprobs(shard.microbatches, temperature=temperature)
    ref = wired.reference.logprobs(shard.microbatches, temperature=temperature)
    paid = 0.0
    for place, target in enumerate(compute_targets(shard, wired, config)):
        d = (ref[place] - old[place]).double()
        kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[estimator]
        torch.testing.assert_close(target.kl_R.double(), kl, rtol=1e-5, atol=1e-6)
        assert target.ref_logprobs_R is target.old_logprobs_R is None
        batch_ = shard.microbatches[place]
        ends = batch_.responses.cu_seqlens_S1.tolist()
        for reward, begin, end in zip(batch_.rewards_S, ends, ends[1:], strict=False):
            to_go = reward - 0.1 * kl[begin:end].flip(0).cumsum(0).flip(0)
            torch.testing.assert_close(
                target.returns_R[begin:end].double(), to_go, rtol=1e-4, atol=1e-5
            )
        paid += float(kl.abs().sum())
    assert paid > 0
    metrics = learn(wired, config, replace(batch, step=2))
    assert metrics["perf/forward_passes"] == 8.75  # old and reference log-probs beside the 6.75
    assert metrics["actor/kl"] != 0


def test_a_group_costs_three_passes_and_no_critic() -> None:
    shape = read_shape(BASE_MODEL)
    group = ["rl.advantage=group", f"model.path={BASE_MODEL}"]
    config = load_config(ROOT / "configs/tiny.toml", group)
    with_critic = load_config(ROOT / "configs/tiny.toml", group[1:])
    assert (ppo_passes(config.rl).decoder, ppo_passes(with_critic.rl).decoder) == (3, 6.75)
    assert config.rl.passes == ("actor",)
    less, more = (memory_plan(c, shape, 1, recipe_stage="rl") for c in (config, with_critic))
    assert less.optimizer < 0.6 * more.optimizer
    assert less.gradients < 0.6 * more.gradients


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rl.advantage=group", "rl.samples_per_prompt=1"], "samples_per_prompt of 2 or more"),
        (["rl.dual_clip=0.5"], "must be over 1"),
        (["rl.dual_clip=3.0", "rl.objective=cispo"], "goes with rl.objective=ppo"),
        (["rl.kl_coef=0.1", "rl.kl_estimator=k1"], "pushes nowhere"),
        (["rl.advantage=group", "rl.kl_coef=0.1", "rl.kl_in=reward"], "baseline does not know"),
        (["rl.objective=gspo"], "weighs whole responses"),
        (["rl.objective=gspo", "rl.advantage=group", "rl.normalization=sequence_mean",
          "rl.entropy_coef=0.1"], "takes no rl.kl_coef"),
        (["rl.advantage=group", "rollout.partial=true", "rollout.max_staleness=2"],
         "without the others"),
        (["rl.refill=true", "rollout.max_staleness=1"], "samples until a step is full"),
        (["rl.objective=grpo"], "rl.objective"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_settings_that_contradict_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs/tiny.toml", words)


@pytest.mark.slow
def test_a_response_without_a_group_is_named(models: Path) -> None:
    folder = models / "wide"
    batch = step_ranks.rollouts_of(folder, models / "conversations" / "conversations.jsonl")
    config = settings(folder, *GROUP[:2], "rl.max_prompt_tokens=300", lr=0.0)
    alone = replace(batch, rollouts=batch.rollouts[: step_ranks.SAMPLES + 1])
    with pytest.raises(Exception, match="1 has one response in step 1"):
        learn(build(folder, config), config, alone)


@pytest.mark.slow
def test_a_rehearsed_rank_reports_all_that_a_loss_does(models: Path) -> None:
    """One that is not on the last pipeline stage hears of no loss, alone on a pretended card."""
    from ovr_fast.rehearse.stand_ins import REPORTED

    folder = models / "wide"
    batch = step_ranks.rollouts_of(folder, models / "conversations" / "conversations.jsonl")
    config = step_ranks.config_of(folder, "rl.kl_coef=0.1")
    wired = build(folder, config)
    said: set[str] = set()
    for learner in (wired.actor, wired.critic):

        def kept(*arguments: Any, update: Any = learner.update) -> dict[str, float]:
            found = update(*arguments)
            said.update(found)
            return found

        learner.update = kept
    learn(wired, config, batch)
    assert said - {"grad_norm", "lr"} <= set(REPORTED)


def test_the_defaults_are_the_paper_s() -> None:
    rl = RLConfig()
    assert (rl.advantage, rl.objective, rl.normalization) == ("gae", "ppo", "token_mean")
    assert rl.passes == ("values", "critic", "actor")
