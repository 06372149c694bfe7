"""What ``--dry-run`` prints: resolved settings, layout, memory and batch arithmetic."""

from __future__ import annotations

import math

from ovr_fast.config import FROZEN_PARTS, Config, ConfigError, to_toml
from ovr_fast.model.shape import ModelShape
from ovr_fast.parallel.mesh import data_parallel_size, split_layers


def check_layout(config: Config, shape: ModelShape, world: int) -> int:
    """Data-parallel size of a run, after checking the settings against model and world.

    Raises:
        ConfigError: the layout does not divide the world or the model, or a batch is too small
            or too long for it.
    """
    parallel, rl, cold = config.parallel, config.rl, config.cold_start
    try:
        dp = data_parallel_size(world, tensor=parallel.tensor, pipeline=parallel.pipeline)
        shape.check_tensor_parallel(parallel.tensor)
        split_layers(shape.layers, parallel.pipeline)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if "rl" in config.run.stages:
        rollouts = rl.prompts_per_step * rl.samples_per_prompt
        if rollouts < rl.critic_steps * dp:
            raise ConfigError(
                f"{rollouts} rollouts a step are too few for rl.critic_steps={rl.critic_steps} on "
                f"{dp} data-parallel ranks; raise rl.prompts_per_step"
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


def describe(config: Config, shape: ModelShape, world: int) -> str:
    """The plan of a run as text.

    Raises:
        ConfigError: see ``check_layout``.
    """
    dp = check_layout(config, shape, world)
    tp, pp = config.parallel.tensor, config.parallel.pipeline
    counts = shape.parameter_counts()
    total = sum(counts[part] for part in ("language", "tower", "merger"))
    element = 2 if config.model.dtype == "bfloat16" else 4
    stages = split_layers(shape.layers, pp)
    weights, gradients, optimizer = max(
        (
            (held * element, trained * 4, trained * (8 if element == 4 else 12) / dp)
            for held, trained in _parameters_by_stage(config, shape, counts)
        ),
        key=sum,
    )
    gib = 2**30
    lines = [
        to_toml(config),
        "# plan",
        f"world            {world} ranks = tensor {tp} x pipeline {pp} x data {dp}",
        f"layers           {' + '.join(str(len(stage)) for stage in stages)} by pipeline stage",
        f"parameters       {total:,} (language {counts['language']:,}, tower {counts['tower']:,}, "
        f"merger {counts['merger']:,})",
        f"memory a rank    {(weights + gradients + optimizer) / gib:.1f} GiB a trained model: "
        f"weights {weights / gib:.1f}, gradients {gradients / gib:.1f}, "
        f"optimizer {optimizer / gib:.1f} (fullest rank); activations and vLLM come on top",
    ]
    if "cold_start" in config.run.stages:
        c = config.cold_start
        tokens = c.rows_per_step * c.row_tokens
        lines += [
            f"cold start       {c.steps:,} steps x {c.rows_per_step} rows x {c.row_tokens:,} "
            f"tokens = at most {c.steps * tokens:,} tokens",
            f"  a step         {tokens:,} tokens, {math.ceil(c.rows_per_step / dp)} microbatches "
            "a rank",
        ]
    if "rl" in config.run.stages:
        r = config.rl
        rollouts = r.prompts_per_step * r.samples_per_prompt
        longest = r.max_prompt_tokens + r.max_response_tokens
        # If every response has full length; each critic minibatch is packed by itself.
        per_microbatch = r.max_tokens_per_microbatch // longest
        per_minibatch = math.ceil(math.ceil(rollouts / r.critic_steps) / dp)
        microbatches = r.critic_steps * math.ceil(per_minibatch / per_microbatch)
        lines += [
            f"rl               {r.steps:,} steps x {r.prompts_per_step} prompts x "
            f"{r.samples_per_prompt} samples = {r.steps * rollouts:,} rollouts",
            f"  a step         {rollouts:,} rollouts, at most {rollouts * longest:,} tokens; "
            f"{rollouts / dp:,.0f} rollouts a rank, at most "
            f"{microbatches:,} microbatches",
            f"  updates        actor {r.policy_steps} x {rollouts // r.policy_steps:,} rollouts, "
            f"critic {r.critic_steps} x {rollouts // r.critic_steps:,}",
            "  passes         values, critic, actor"
            + (", old log-probs" if r.policy_steps > 1 else "")
            + (", reference log-probs" if r.kl_coef else ""),
        ]
    return "\n".join(lines)


def _parameters_by_stage(
    config: Config, shape: ModelShape, counts: dict[str, int]
) -> list[tuple[float, float]]:
    """Parameters that a rank of each pipeline stage holds, and trains: layers and embeddings are
    cut over tensor ranks, the vision model stands whole on every rank."""
    tp, pp = config.parallel.tensor, config.parallel.pipeline
    trained = [len(stage) * counts["layer"] / tp for stage in split_layers(shape.layers, pp)]
    trained[0] += counts["embedding"] / tp
    if pp > 1 or not shape.tied_embeddings:  # a tied embedding has a copy on the last stage
        trained[-1] += counts["embedding"] / tp
    held = list(trained)
    for part in ("tower", "merger"):
        held = [size + counts[part] for size in held]
        if part not in FROZEN_PARTS[config.model.train_vision]:
            trained = [size + counts[part] for size in trained]
    return list(zip(held, trained, strict=True))
