"""What ``--dry-run`` prints: resolved settings, layout, memory and batch arithmetic."""

from __future__ import annotations

import math

from ovr_fast.config import Config
from ovr_fast.plan.flops import ppo_passes
from ovr_fast.plan.layout import check_layout, most_microbatches
from ovr_fast.plan.memory import BESIDE_GIB, CARD_GIB, PARTS, MemoryPlan, memory_plan
from ovr_fast.settings import to_toml
from ovr_fast.shape.cost import split_layers
from ovr_fast.shape.model_shape import ModelShape


def describe(config: Config, shape: ModelShape, world: int) -> str:
    """The plan of a run as text.

    Raises:
        ConfigError: see ``check_layout``.
    """
    dp = check_layout(config, shape, world)
    tp, pp = config.parallel.tensor, config.parallel.pipeline
    counts = shape.parameter_counts()
    total = sum(counts[part] for part in PARTS)
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
            *_memory_lines(
                "cold start", memory_plan(config, shape, world, recipe_stage="cold_start")
            ),
            f"cold start       {c.steps:,} steps x {c.rows_per_step} rows x {c.row_tokens:,} "
            f"tokens = at most {c.steps * tokens:,} tokens",
            f"  a step         {tokens:,} tokens, {math.ceil(c.rows_per_step / dp)} microbatches "
            "a rank",
        ]
    if "rl" in config.run.stages:
        r = config.rl
        rollouts = r.prompts_per_step * r.samples_per_prompt
        longest = r.max_prompt_tokens + r.max_response_tokens
        lines += [
            *_memory_lines("rl", memory_plan(config, shape, world, recipe_stage="rl")),
            f"rl               {r.steps:,} steps x {r.prompts_per_step} prompts x "
            f"{r.samples_per_prompt} samples = {r.steps * rollouts:,} rollouts",
            f"  a step         {rollouts:,} rollouts, at most {rollouts * longest:,} tokens; "
            f"{rollouts / dp:,.0f} rollouts a rank, at most "
            f"{most_microbatches(config, dp):,} microbatches",
            f"  updates        actor {r.policy_steps} x {rollouts // r.policy_steps:,} rollouts"
            + (f", critic {r.critic_steps} x {rollouts // r.critic_steps:,}" * r.has_critic),
            f"  passes         {', '.join(r.passes)}: "
            f"{ppo_passes(r).decoder:g} forward passes' work",
        ]
    return "\n".join(lines)


def _memory_lines(name: str, plan: MemoryPlan) -> list[str]:
    too_much = [
        f"                 DOES NOT FIT a card of {CARD_GIB} GiB; most of it is {plan.largest}: "
        "more recomputation, tensor or pipeline ranks, offload, or shorter responses"
    ]
    return [
        f"memory, {name:<10} {plan.total:.1f} GiB on the fullest rank: weights {plan.weights:.1f}, "
        f"gradients {plan.gradients:.1f}, optimizer {plan.optimizer:.1f}, "
        f"activations {plan.activations:.1f}, then a layer's backward {plan.layer:.1f} or the "
        f"head {plan.head:.1f}",
        f"                 {plan.waiting:.1f} GiB stay while vLLM generates",
        f"                 {plan.host_total:.1f} GiB of the host: {plan.host:.1f} wait there while "
        f"vLLM generates, {plan.server:.1f} a sleeping server's, {plan.checkpoint:.1f} of a "
        "checkpoint until it is written",
        f"                 {plan.card:.1f} GiB of the card, with the allocator's gaps, context, "
        "kernels, NCCL (make rehearse measures them)",
        *(too_much if plan.total + BESIDE_GIB > CARD_GIB else []),
    ]
