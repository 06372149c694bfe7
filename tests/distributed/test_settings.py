"""Settings of the training half change what they say they change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ovr_fast.config import Config
from ovr_fast.model.hf_weights import export_hf
from ovr_fast.recipe.alone import learn
from ovr_fast.recipe.build import Models
from ovr_fast.recipe.ppo import compute_advantages, compute_targets, update_critic
from ovr_fast.recipe.shards import pack_shard
from ovr_fast.records import PackedShard, RolloutBatch, Targets
from support.image_run import build, image_rollouts, image_settings, settings
from support.random_models import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "wide", "wide")


@pytest.fixture(scope="module")
def batch(folder: Path) -> RolloutBatch:
    models = build(folder, image_settings(folder, "frozen"))
    return image_rollouts(models.chat)


def wired(folder: Path, *overrides: str, lr: float = 1e-3, **optimizer) -> tuple[Models, Config]:
    """Models and settings; ``optimizer`` is of actor and critic."""
    config = settings(folder, *overrides, lr=lr)
    chosen = replace(config.rl.actor, **optimizer)
    config = replace(config, rl=replace(config.rl, actor=chosen, critic=chosen))
    return build(folder, config), config


def all_targets(shard: PackedShard, models: Models, config: Config) -> list[Targets]:
    """As the actor gets them; the critic does not move."""
    targets = compute_targets(shard, models, config)
    still = replace(models.critic.settings, lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.critic, "settings", still)
        _, targets = update_critic(models.critic, shard, targets, config)
    return compute_advantages(shard, targets, models, config)


def steps(
    folder: Path, batch: RolloutBatch, *overrides: str, count: int = 1, **optimizer
) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics of the last of some steps, and the actor's weights after it."""
    models, config = wired(folder, *overrides, **optimizer)
    for step in range(1, count + 1):
        metrics = learn(models, config, replace(batch, step=step))
    return metrics, language_weights(models)


def language_weights(models: Models) -> torch.Tensor:
    """The actor's weights but for the frozen vision side, end to end."""
    exported = export_hf(models.actor.model, skip_parts=("tower", "merger"))
    return torch.cat([tensor.flatten() for _, tensor in exported])


def test_advantages_are_normalised_over_the_step_or_left(folder: Path, batch: RolloutBatch) -> None:
    """OVR: one mean and one standard deviation over all response tokens of the step."""
    models, config = wired(folder, "rl.max_tokens_per_microbatch=400")
    shard = pack_shard(batch, models, config)
    assert len(shard.microbatches) > 4
    targets = all_targets(shard, models, config)
    whole = torch.cat([target.advantages_R for target in targets]).double()
    assert float(whole.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(whole.std(correction=0)) == pytest.approx(1.0, rel=1e-6)
    plain = replace(config, rl=replace(config.rl, normalize_advantages=False))
    raw = torch.cat([target.advantages_R for target in all_targets(shard, models, plain)]).double()
    torch.testing.assert_close(
        whole, (raw - raw.mean()) / raw.std(correction=0), rtol=1e-5, atol=1e-6
    )
    for target in all_targets(shard, models, plain):  # gamma = lambda = 1: reward to go less value
        torch.testing.assert_close(target.advantages_R, target.returns_R - target.old_values_R)


def test_the_discount_and_lambda_of_gae_by_hand(folder: Path, batch: RolloutBatch) -> None:
    models, config = wired(
        folder, "rl.gamma=0.9", "rl.gae_lambda=0.5", "rl.normalize_advantages=false"
    )
    shard = pack_shard(batch, models, config)
    microbatch, target = shard.microbatches[0], all_targets(shard, models, config)[0]
    length, reward = microbatch.responses.lengths[0], microbatch.rewards_S[0]
    values, running, following = target.old_values_R[:length].tolist(), 0.0, 0.0
    for t in reversed(range(length)):
        given = reward if t == length - 1 else 0.0
        running = given + 0.9 * following - values[t] + 0.9 * 0.5 * running
        following = values[t]
        assert float(target.advantages_R[t]) == pytest.approx(running, abs=1e-6)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rl.kl_coef=0.1", "actor/kl"),
        ("rl.entropy_coef=0.01", "actor/loss"),
        ("rl.value_clip_eps=0.0001", "critic/loss"),
        ("rl.critic_steps=2", "critic/loss"),
        ("rl.max_tokens_per_microbatch=400", "pack/empty_share"),
        ("rl.policy_steps=2", "actor/ratio"),
        ("rollout.temperature=0.5", "actor/entropy"),
    ],
)
def test_settings_of_ppo_move_their_metric(
    folder: Path, batch: RolloutBatch, override: str, key: str
) -> None:
    plain, _ = steps(folder, batch)
    other, _ = steps(folder, batch, override)
    assert other.get(key) != plain.get(key)


def test_the_clip_bounds_the_ratio(folder: Path, batch: RolloutBatch) -> None:
    shares = [
        steps(folder, batch, "rl.policy_steps=4", f"rl.clip_eps={eps}")[0]["actor/clip_frac"]
        for eps in (0.01, 0.9)
    ]
    assert shares[0] > shares[1]


def test_weight_decay_is_adamw_s(folder: Path, batch: RolloutBatch) -> None:
    """Decoupled (Loshchilov and Hutter 2019): a step takes rate x decay of a weight, besides."""
    models, _ = wired(folder)
    before = language_weights(models)
    _, plain = steps(folder, batch)
    _, decayed = steps(folder, batch, weight_decay=0.5)
    taken = plain - decayed
    matrices = taken != 0  # Megatron decays no biases and norms
    torch.testing.assert_close(taken[matrices], 1e-3 * 0.5 * before[matrices], rtol=2e-3, atol=2e-6)
    assert matrices.float().mean() > 0.9


@pytest.mark.parametrize(
    "optimizer", [{"beta1": 0.5}, {"beta2": 0.5}, {"max_grad_norm": 1e-9}, {"lr": 1e-4}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_settings_of_adamw_move_the_weights(
    folder: Path, batch: RolloutBatch, optimizer: dict
) -> None:
    _, plain = steps(folder, batch, count=2)
    _, other = steps(folder, batch, count=2, **optimizer)
    assert not torch.equal(plain, other)


def test_rates_warm_up_and_decay_over_all_optimizer_steps(
    folder: Path, batch: RolloutBatch
) -> None:
    """Warm-up and cosine count optimizer steps: the critic takes four a step, the actor one."""
    options = dict(warmup_steps=2, min_lr=1e-4)
    models, config = wired(folder, "rl.steps=4", **options)
    config = replace(config, rl=replace(config.rl, decay="cosine"))
    models = build(folder, config)
    history = [learn(models, config, replace(batch, step=step)) for step in range(1, 5)]
    actor = [metrics["actor/lr"] for metrics in history]
    assert actor == pytest.approx([5e-4, 1e-3, 1e-3, 5.5e-4])  # 2 of warm-up, then half a cosine
    critic = [metrics["critic/lr"] for metrics in history]
    assert critic[0] == pytest.approx(1e-4 + 9e-4 * 0.5 * (1 + torch.tensor(torch.pi / 14).cos()))
    assert critic == sorted(critic, reverse=True)
    assert models.critic.total_steps == 16


def test_images_go_through_the_tower_in_budgets_and_the_cache_keeps_them(
    folder: Path, batch: RolloutBatch
) -> None:
    calls = []
    models, config = wired(folder, "model.vision_patches=1")
    tower = models.vision.encoders[0].tower
    tower.register_forward_hook(lambda *_: calls.append(1))
    learn(models, config, batch)
    assert len(calls) == 3  # one image at a time
    models, config = wired(folder)
    models.vision.encoders[0].tower.register_forward_hook(lambda *_: calls.append(1))
    learn(models, config, batch)
    assert len(calls) == 4  # and all of them together
    kept = learn(models, config, replace(batch, step=2))
    assert kept["vision/cache_hits"] == 3
    other = image_rollouts(models.chat, count=6, size=(61, 90))
    for number, mib in enumerate((0, 64)):
        models, config = wired(folder, f"model.vision_cache_mib={mib}")
        for step, rollouts in enumerate((batch, other, batch), 1):
            metrics = learn(models, config, replace(rollouts, step=step))
        assert metrics["vision/cache_hits"] == 3 * number  # of the step before the last
