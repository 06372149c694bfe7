"""Whether settings, model and world fit together: asked by ``--dry-run`` and by every start."""

from __future__ import annotations

import math

from ovr_fast.config import Config, data_parallel_size
from ovr_fast.settings import ConfigError
from ovr_fast.shape.cost import split_layers
from ovr_fast.shape.model_shape import ModelShape


def check_layout(config: Config, shape: ModelShape, world: int) -> int:
    """Data-parallel size of a run, after checking the settings against model and world.

    Raises:
        ConfigError: the layout does not divide the world or the model, or a batch is too small
            or too long for it.
    """
    parallel, rl, cold = config.parallel, config.rl, config.cold_start
    dp = data_parallel_size(world, tensor=parallel.tensor, pipeline=parallel.pipeline)
    shape.check_tensor_parallel(parallel.tensor)
    split_layers(shape, parallel.pipeline, head=True)
    if "rl" in config.run.stages:
        rollouts = rl.prompts_per_step * rl.samples_per_prompt
        steps = f"{'critic_steps' if rl.has_critic else 'policy_steps'}={rl.minibatches}"
        if rollouts < rl.minibatches * dp:
            raise ConfigError(
                f"{rollouts} rollouts a step are too few for rl.{steps} on "
                f"{dp} data-parallel ranks; raise rl.prompts_per_step"
            )
        if config.model.train_vision != "frozen":
            # A prompt's samples stay in one minibatch; the emptiest has so many prompts.
            prompts = rl.prompts_per_step // rl.minibatches
            if prompts * rl.samples_per_prompt < dp:
                raise ConfigError(
                    f"with model.train_vision={config.model.train_vision} a prompt's samples stay "
                    f"in one of rl.{steps} minibatches, of which one has "
                    f"{prompts * rl.samples_per_prompt} rollouts for {dp} data-parallel ranks; "
                    "raise rl.prompts_per_step"
                )
        longest = rl.max_prompt_tokens + rl.max_response_tokens
        if longest > shape.max_positions:
            raise ConfigError(
                f"rl.max_prompt_tokens + rl.max_response_tokens = {longest} is over the model's "
                f"{shape.max_positions} positions"
            )
    if "cold_start" in config.run.stages:
        if cold.rows_per_step < dp:
            raise ConfigError(
                f"cold_start.rows_per_step={cold.rows_per_step} is fewer than the {dp} "
                "data-parallel ranks"
            )
        if cold.row_tokens > shape.max_positions:
            raise ConfigError(
                f"cold_start.row_tokens={cold.row_tokens} is over the model's "
                f"{shape.max_positions} positions"
            )
    return dp


def check_world(config: Config, world: int) -> None:
    """Raises ConfigError if the settings plan for another number of ranks than were started."""
    if config.parallel.world not in (0, world):
        raise ConfigError(
            f"the settings plan for parallel.world={config.parallel.world} ranks, but {world} "
            f"were started; set parallel.world={world} (and check --dry-run)"
        )


def most_microbatches(config: Config, dp: int) -> int:
    """Microbatches of a rank's PPO step if every response has full length; each minibatch is packed
    by itself."""
    rl = config.rl
    longest = rl.max_prompt_tokens + rl.max_response_tokens
    rollouts = rl.prompts_per_step * rl.samples_per_prompt
    per_minibatch = math.ceil(math.ceil(rollouts / rl.minibatches) / dp)
    return rl.minibatches * math.ceil(per_minibatch / (rl.max_tokens_per_microbatch // longest))
