"""What ``--dry-run`` prints: resolved settings, layout, memory and batch arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ovr_fast.config import FROZEN_PARTS, Config, ConfigError, to_toml
from ovr_fast.model.cost import split_layers
from ovr_fast.model.shape import ModelShape
from ovr_fast.parallel.mesh import data_parallel_size


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
        split_layers(shape, parallel.pipeline, head=True)
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
    stages = split_layers(shape, pp, head=True)
    lines = [
        to_toml(config),
        "# plan",
        f"world            {world} ranks = tensor {tp} x pipeline {pp} x data {dp}",
        f"layers           {' + '.join(str(len(stage)) for stage in stages)} by pipeline stage",
        f"parameters       {total:,} (language {counts['language']:,}, tower {counts['tower']:,}, "
        f"merger {counts['merger']:,})",
    ]
    if "cold_start" in config.run.stages:
        c = config.cold_start
        tokens = c.rows_per_step * c.row_tokens
        lines += [
            *_memory_lines("cold start", memory_plan(config, shape, world, stage="cold_start")),
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
            *_memory_lines("rl", memory_plan(config, shape, world, stage="rl")),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the fullest rank holds while it trains, GiB, by class; vLLM is not among it."""

    weights: float  # of the models that stay on the device, vision tower included
    gradients: float  # fp32, of the models that stay
    optimizer: float  # fp32 master weights (none beside fp32 models) and two moments, sharded
    activations: float  # of the microbatches in flight, and one layer computed again
    head: float  # gathered last states, and the logits of one chunk
    waiting: float  # on the device while vLLM generates

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def memory_plan(config: Config, shape: ModelShape, world: int, *, stage: str) -> MemoryPlan:
    """The arithmetic of what fits, for ``stage`` "cold_start" or "rl".

    An estimate: it counts tensors, not the allocator's gaps, CUDA's context (about 1 GiB) or
    communication buffers.
    """
    dp = check_layout(config, shape, world)
    tp, pp = config.parallel.tensor, config.parallel.pipeline
    element = 2 if config.model.dtype == "bfloat16" else 4
    frozen = stage == "cold_start" or config.model.train_vision == "frozen"
    state = (8 if element == 4 else 12) / dp
    if stage == "rl":
        tokens, heads = config.rl.max_tokens_per_microbatch, [True, False]  # actor, critic
        offload = config.parallel.offload
        references = int(config.rl.kl_coef != 0)
    else:
        tokens, heads, offload, references = config.cold_start.row_tokens, [True], "none", 0
    counts = shape.parameter_counts()
    vision = (counts["tower"] + counts["merger"]) * element
    plans = []
    for place in range(pp):
        sizes = []  # of the language model's shard here, a model
        layers = []
        for head in heads:
            own = split_layers(shape, pp, head=head)[place]
            embeddings = (place == 0) + (head and place == pp - 1)
            if pp == 1 and shape.tied_embeddings:
                embeddings = 1
            layers.append(len(own))
            sizes.append((len(own) * counts["layer"] + embeddings * counts["embedding"]) / tp)
        trained = list(sizes)
        if not frozen:
            parts = FROZEN_PARTS[config.model.train_vision]
            extra = sum(counts[part] for part in ("tower", "merger") if part not in parts)
            trained = [size + extra for size in trained]
        towers = vision * (1 if frozen else len(heads) + references)
        reference = references * sizes[0] * element
        here = [size * element for size in sizes]
        in_flight = min(pp - place, pp)
        per_token = _activation_bytes(shape, config.model.recompute, element, tp)
        whole_layer = _activation_bytes(shape, "none", element, tp)
        again = 0.0 if config.model.recompute == "none" else whole_layer
        activations = (max(layers) * per_token * in_flight + again) * tokens
        last = place == pp - 1
        chunk = min(HEAD_CHUNK, tokens) * (shape.vocab // tp) * element
        resident = max if offload != "none" else sum
        plans.append(
            MemoryPlan(
                weights=((max if offload == "model" else sum)(here) + reference + towers) / GIB,
                gradients=4 * resident(trained) / GIB,
                optimizer=state * resident(trained) / GIB,
                activations=activations / GIB,
                head=last * (tokens * shape.hidden * element + chunk) / GIB,
                waiting=(
                    towers
                    + reference
                    + (offload != "model") * sum(here)
                    + (offload == "none") * (4 + state) * sum(trained)
                )
                / GIB,
            )
        )
    return max(plans, key=lambda plan: plan.total)


GIB = 2**30
HEAD_CHUNK = 8192
"""Rows whose logits the head holds at a time (``ovr_kernels.linear_policy_loss``)."""


def _activation_bytes(shape: ModelShape, recompute: str, element: int, tp: int) -> float:
    """What a rank's decoder layer keeps of a token of the microbatch for its backward: inputs of
    norms and products, attention's q, k, v and result, all cut by tensor and sequence parallelism;
    but selective recomputation keeps the two row-parallel products before they are scattered."""
    h, kv, wide = shape.hidden, shape.kv_heads * shape.head_dim, shape.intermediate
    if recompute == "full":
        return element * h / tp
    products = h + (h + 2 * kv) + 2 * wide  # attention; qkv; gate and up
    if recompute == "selective":
        return element * ((h + products) / tp + 2 * h)
    return element * (3 * h + products + 2 * h + (h + 2 * kv) + wide) / tp  # norms, q and k, SwiGLU


def _memory_lines(name: str, plan: MemoryPlan) -> list[str]:
    return [
        f"memory, {name:<9}{plan.total:.1f} GiB on the fullest rank: weights {plan.weights:.1f}, "
        f"gradients {plan.gradients:.1f}, optimizer {plan.optimizer:.1f}, "
        f"activations {plan.activations:.1f}, head {plan.head:.1f}",
        f"                 {plan.waiting:.1f} GiB stay while vLLM generates",
    ]
