"""What a recipe costs: its passes through the models, and the FLOPs of a rollout."""

from __future__ import annotations

from collections import Counter

from ovr_fast.config import RLConfig
from ovr_fast.data.images import ImageProcessor
from ovr_fast.records import RolloutBatch
from ovr_fast.shape.cost import Passes, prefix_flops, sequence_flops, tower_flops
from ovr_fast.shape.model_shape import ModelShape

COLD_START_PASSES = Passes(decoder=3, head=3)
"""Forward and backward of one model."""


def ppo_passes(rl: RLConfig) -> Passes:
    """Values up to 1 (``RLConfig.value_passes``), critic 3, actor 3: strictly on-policy PPO is 6.75
    forward-pass equivalents with four critic steps, 6 with one; the actor's 3 alone with a group's
    baseline. Old log-probs and reference log-probs, where they are needed (``RLConfig.passes``),
    are one more each, with the output head."""
    more = sum(name.endswith("log-probs") for name in rl.passes)
    return Passes(decoder=3 + 3 * rl.has_critic + rl.value_passes + more, head=3 + more)


def packed_passes(rl: RLConfig, *, early: bool) -> Passes:
    """Those that are made of a step's packed microbatches: with ``early`` not what was scored while
    others were sampled."""
    every, names = ppo_passes(rl), rl.early_passes if early else ()
    heads = sum(name.endswith("log-probs") for name in names)
    return Passes(decoder=every.decoder - len(names), head=every.head - heads)


def together(rl: RLConfig, samples: float, *, tower_trained: bool) -> float:
    """How many of a prompt's responses are in a minibatch that has any, on average. They are drawn
    into minibatches one by one; with a trained tower whole prompts are."""
    count = rl.minibatches
    if tower_trained or count == 1:
        return samples
    return samples / (count * (1.0 - (1.0 - 1.0 / count) ** samples))


def rollout_flops(
    rollouts: RolloutBatch,
    shape: ModelShape,
    processor: ImageProcessor,
    passes: Passes,
    *,
    tower_trained: bool,
) -> list[float]:
    """FLOPs of each rollout in all passes of a step; an image's are split over its samples.

    Args:
        passes: of the step.
        tower_trained: a trained tower makes as many passes as the language models, a frozen one a
            single pass.
    """
    tower_passes = passes.decoder if tower_trained else 1
    samples = Counter(rollout.prompt_index for rollout in rollouts.rollouts)
    towers = {
        index: tower_passes
        * sum(tower_flops(processor.grid(image), shape.vision) for image in prompt.images)
        / samples[index]
        for index, prompt in enumerate(rollouts.prompts)
        if samples[index]
    }
    return [
        towers[rollout.prompt_index]
        + sequence_flops(
            shape,
            len(rollout.prompt_tokens) + len(rollout.response_tokens),
            len(rollout.response_tokens),
            passes,
        )
        for rollout in rollouts.rollouts
    ]


def spared_flops(
    rollouts: RolloutBatch,
    shape: ModelShape,
    passes: Passes,
    rl: RLConfig,
    *,
    tower_trained: bool,
) -> list[float]:
    """FLOPs of ``passes`` that each rollout spares where microbatches have a prompt once, if a
    replica has all of its responses in a minibatch."""
    samples = Counter(rollout.prompt_index for rollout in rollouts.rollouts)
    shares = {
        index: 1.0 - 1.0 / together(rl, count, tower_trained=tower_trained)
        for index, count in samples.items()
    }
    return [
        shares[rollout.prompt_index] * prefix_flops(shape, len(rollout.prompt_tokens), passes)
        for rollout in rollouts.rollouts
    ]
