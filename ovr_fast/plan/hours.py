"""What a step of RL takes on a layout, phase by phase, and a run's GPU-hours.

Operations are counted (``shape.cost``, recomputation added), seconds are operations over ``Rates``,
and what is not a product is added to them: a tensor group's collectives (not overlapped: Megatron
issues them between the products), the pipeline's bubble, gradients over data-parallel ranks, the
copies of an offloaded model and of a checkpoint, the weight sync. Left out: starting, evaluation,
verifying, and the vision tower (frozen, 1.7 TFLOP an image of 1,300 tokens, once a step).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from ovr_fast.config import Config, data_parallel_size
from ovr_fast.plan.decode import Decoded, Server, decode, draw_lengths
from ovr_fast.plan.flops import together
from ovr_fast.plan.rates import End, Rates
from ovr_fast.rl.curriculum import ContextCurriculum
from ovr_fast.settings import ConfigError
from ovr_fast.shape.cost import head_flops, projection_flops
from ovr_fast.shape.model_shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is not in the settings: how long prompts and responses are."""

    prompt_tokens: float = 1200.0
    response_tokens: float = 9500.0  # OVR's mean over its run, read off its figure 4
    spread: float = 0.8  # of the lengths' logarithm


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHours:
    """A step on a layout."""

    tokens: float  # of responses
    tflop: dict[str, float]  # counted, by phase, recomputation included
    seconds: dict[str, float]  # by phase
    train_gpus: int
    rollout_gpus: int
    colocated: bool
    staleness: int  # rollout.max_staleness
    early: bool  # rl.score_while_sampling
    again_s: float  # prefilling what is live, once
    decoded: Decoded = field(repr=False)

    @property
    def gpus(self) -> int:
        """That the run rents."""
        return self.train_gpus if self.colocated else self.train_gpus + self.rollout_gpus

    @property
    def rollout_s(self) -> float:
        """Of prefill and decoding."""
        return self.seconds["prefill"] + self.seconds["decode"]

    @property
    def total_s(self) -> float:
        """One phase after another, but for what is scored while servers sample."""
        return sum(self.seconds.values()) - self.hidden_s

    @property
    def hidden_s(self) -> float:
        """Of the targets, beside sampling. (Ahead, all training is beside it.)"""
        strictly = self.early and not self.staleness
        return min(self.seconds["targets"], self.rollout_s) if strictly else 0.0

    @property
    def training_s(self) -> float:
        """Of what is neither sampled nor sent to the servers."""
        return self.total_s - self.rollout_s - self.seconds["weight_sync"]

    @property
    def sampling_s(self) -> float:
        """Of the servers' work; ahead, they are always full, and what is live at a weight sync is
        prefilled again."""
        if not self.staleness:
            return self.rollout_s
        return self.seconds["prefill"] + self.again_s + self.decoded.full_seconds

    @property
    def ahead_s(self) -> float:
        """With rollouts ahead: training runs beside them where servers have GPUs of their own, and
        the longest response has staleness + 1 steps (colocated: with ``rollout.partial``)."""
        longest = self.decoded.seconds / (self.staleness + 1)
        sampling = max(self.sampling_s, longest)
        if self.colocated:
            return sampling + self.training_s + self.seconds["weight_sync"]
        return max(sampling, self.training_s) + self.seconds["weight_sync"]

    @property
    def step_s(self) -> float:
        """As the settings have it: one phase after another, or rollouts ahead."""
        return self.ahead_s if self.staleness else self.total_s

    @property
    def gpu_hours(self) -> float:
        """Of a step."""
        return self.gpus * self.step_s / 3600


def step_hours(
    config: Config,
    shape: ModelShape,
    rates: Rates,
    workload: Workload,
    *,
    train_gpus: int,
    rollout_gpus: int,
    limit: int,
    end: End = "value",
) -> StepHours:
    """A step of RL whose responses are cut at ``limit``.

    Args:
        train_gpus: the trainer's ranks.
        rollout_gpus: the servers'; colocated, they are the trainer's.
        end: every rate at its value, or at one end of its interval.

    Raises:
        ConfigError: the GPUs do not divide into the layout or into servers, or a server's memory
            does not hold the weights.
    """
    r, rl = rates.at(end), config.rl
    count = rl.prompts_per_step * rl.samples_per_prompt
    check_lengths(workload, limit)
    responses = _responses(workload, count, limit)
    work = Work.of(shape, responses, workload.prompt_tokens)
    trained_work = work
    if rl.share_prefixes:
        tower_trained = config.model.train_vision != "frozen"
        once = together(rl, rl.samples_per_prompt, tower_trained=tower_trained)
        trained_work = work.sparing(count * (1.0 - 1.0 / once) * workload.prompt_tokens)
    tflop, seconds = training(config, shape, r, trained_work, train_gpus)
    server, servers = server_of(config, shape, r, rollout_gpus)
    decoded = _slowest_server(server, workload, count, servers, limit)
    prompts = rl.prompts_per_step * workload.prompt_tokens
    tflop["prefill"] = server.flops_a_token * prompts
    tflop["decode"] = server.flops_a_token * float(responses.sum()) + work.attention
    rate = rollout_gpus * r["prefill_tflops"] * 1e12
    return StepHours(
        tokens=float(responses.sum()),
        tflop={phase: flops / 1e12 for phase, flops in tflop.items()},
        seconds={
            "prefill": tflop["prefill"] / rate,
            "decode": decoded.seconds,
            **seconds,
            "weight_sync": _model_bytes(shape) / (r["network_gb_s"] * 1e9),
            "save": _state_bytes(config, shape, train_gpus)
            / (r["pcie_gb_s"] * 1e9)
            / config.run.save_every,
        },
        train_gpus=train_gpus,
        rollout_gpus=rollout_gpus,
        colocated=config.rollout.placement == "colocated",
        staleness=config.rollout.max_staleness,
        early=config.rl.score_while_sampling,
        again_s=server.flops_a_token * decoded.most_tokens / server.flops_a_second,
        decoded=decoded,
    )


def check_lengths(workload: Workload, limit: int) -> None:
    """Raises ConfigError where the mean response is longer than the longest may be."""
    if workload.response_tokens > limit:
        raise ConfigError(
            f"responses of {workload.response_tokens:,.0f} tokens on average are cut at {limit:,}; "
            "lower --response-tokens"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One forward pass over a step's rollouts, operations."""

    tokens: float  # of prompts and responses
    attention: float
    linear: float  # the layers' products that are linear in tokens
    head: float

    @classmethod
    def of(cls, shape: ModelShape, responses: np.ndarray, prompt_tokens: float) -> Work:
        """Of responses of these lengths."""
        tokens = responses + prompt_tokens
        return cls(
            tokens=float(tokens.sum()),
            attention=shape.layers * float((2.0 * tokens**2 * shape.hidden).sum()),
            linear=projection_flops(shape, 1) * shape.layers * float(tokens.sum()),
            head=head_flops(shape, int(responses.sum())),
        )

    def sparing(self, tokens: float) -> Work:
        """Without so many prompt tokens, which a microbatch has once. Attention's operations stay:
        they are made with every response."""
        left = 1.0 - tokens / self.tokens
        return replace(self, tokens=self.tokens * left, linear=self.linear * left)


def training(
    config: Config, shape: ModelShape, r: dict[str, float], work: Work, gpus: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Operations and seconds of the trainer's phases."""
    rl, parallel = config.rl, config.parallel
    dp = data_parallel_size(gpus, tensor=parallel.tensor, pipeline=parallel.pipeline)
    element = 2 if config.model.dtype == "bfloat16" else 4
    again = 1.0 if config.model.recompute == "full" else 0.0  # selective's is in its measured rate
    gathers = 10 + 3 * (config.model.recompute != "none")  # selective repeats them too
    old = sum(name.endswith("log-probs") for name in rl.passes)
    shard = shape.parameter_counts()["language"] / (parallel.tensor * parallel.pipeline)

    def products(flops: float) -> float:
        return flops / (gpus * r["products_tflops"] * 1e12)

    def attention(forward: float, trained: float) -> float:
        seconds = forward / r["attention_forward_tflops"]
        seconds += 3.5 * trained / r["attention_training_tflops"]
        return seconds * work.attention / (gpus * 1e12)

    def collectives(count: float) -> float:
        """A rank's tensor collectives: so many gathers or scatters of [T, h] a layer."""
        share = (parallel.tensor - 1) / parallel.tensor
        a_layer = work.tokens / dp * shape.hidden * element * share * count
        return a_layer * shape.layers / parallel.pipeline / (r["nvlink_gb_s"] * 1e9)

    def bubble(updates: int) -> float:
        """How much longer the pipeline's idle ends make a pass."""
        microbatches = math.ceil(work.tokens / dp / updates / rl.max_tokens_per_microbatch)
        return 1.0 + (parallel.pipeline - 1) / max(1, microbatches)

    def update(updates: int) -> float:
        """Gradients summed, AdamW, new weights gathered."""
        memory = shard * (4 * 2 + 28 / dp) / (r["hbm_gb_s"] * 1e9)
        across = (dp - 1) / dp * shard * (4 + element) / (r["network_gb_s"] * 1e9)
        return updates * (across + memory)

    def trained(head: float, updates: int) -> float:
        flops = (3 + again) * work.linear + head
        pass_ = products(flops) + attention(again, 1) + collectives(gathers)
        return pass_ * bubble(updates) + update(updates)

    before = rl.value_passes + old
    targets = products(before * work.linear + old * work.head) + attention(before, 0)
    seconds = {
        "targets": (targets + collectives(4 * before)) * bubble(1),
        **({"critic": trained(0.0, rl.critic_steps)} if rl.has_critic else {}),
        "actor": trained(3 * work.head, rl.policy_steps),
    }
    state = {"none": 0.0, "optimizer": 12 / dp, "model": 12 / dp + element}[parallel.offload]
    if state:  # of each model, there and back
        seconds["offload"] = 2 * (1 + rl.has_critic) * shard * state / (r["pcie_gb_s"] * 1e9)
    layers = work.linear + work.attention
    tflop = {
        "targets": before * layers + old * work.head,
        **({"critic": (3 + again) * layers} if rl.has_critic else {}),
        "actor": (3 + again) * layers + 3 * work.head,
    }
    return tflop, seconds


def _state_bytes(config: Config, shape: ModelShape, gpus: int) -> float:
    """What a rank copies for a checkpoint of actor and critic: fp32 weights and both moments."""
    counts = shape.parameter_counts()
    return (1 + config.rl.has_critic) * 12.0 * counts["language"] / gpus


def _model_bytes(shape: ModelShape) -> float:
    """Of all weights in bfloat16."""
    counts = shape.parameter_counts()
    return 2.0 * (counts["language"] + counts["tower"] + counts["merger"])


def server_of(
    config: Config, shape: ModelShape, r: dict[str, float], gpus: int
) -> tuple[Server, int]:
    """A server of ``rollout.tensor`` GPUs, and how many ``gpus`` make.

    Raises:
        ConfigError: they do not divide, or its memory does not hold the weights.
    """
    width = config.rollout.tensor
    if shape.heads % width:
        raise ConfigError(f"rollout.tensor={width} does not divide the {shape.heads} heads")
    if gpus < width or gpus % width:
        raise ConfigError(f"{gpus} rollout GPUs do not divide by rollout.tensor={width}")
    counts = shape.parameter_counts()
    read = counts["language"] - (not shape.tied_embeddings) * counts["embedding"]
    kv = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2.0
    kv *= max(1.0, width / shape.kv_heads)  # more GPUs than heads hold some of them twice
    memory = r["memory_gib"] * 2**30 * width * config.rollout.gpu_memory_utilization
    weights = _model_bytes(shape)
    if memory <= weights:
        raise ConfigError(f"a server of rollout.tensor={width} GPUs does not hold the weights")
    latency_s = r["decode_latency_ms"] / 1e3
    if width > 1:
        latency_s += 2 * shape.layers * r["allreduce_us"] / 1e6
    server = Server(
        weight_bytes=2.0 * read,
        bytes_a_token=kv,
        capacity_tokens=(memory - weights) / kv,
        flops_a_token=2.0 * read,
        bytes_a_second=width * r["hbm_gb_s"] * 1e9 * r["decode_share"],
        flops_a_second=width * r["prefill_tflops"] * 1e12,
        latency_s=latency_s,
    )
    return server, gpus // width


@cache
def _responses(workload: Workload, count: int, limit: int) -> np.ndarray:
    return draw_lengths(
        count, mean=workload.response_tokens, limit=limit, spread=workload.spread, seed=0
    )


@cache
def _slowest_server(
    server: Server, workload: Workload, count: int, servers: int, limit: int
) -> Decoded:
    """Of servers that share the responses evenly, the one that has the longest, and begins it."""
    responses = _responses(workload, count, limit)
    own = responses[: math.ceil(count / servers)]
    own = np.concatenate([[responses.max()], own[1:]])
    return decode(server, own, prompt_tokens=workload.prompt_tokens)


def context_stages(config: Config) -> Iterator[tuple[int, int]]:
    """(steps, longest response) of each part of the run, by the settings' schedule; a schedule that
    follows the mean length is one part, at its longest."""
    rl = config.rl
    if len(rl.context_tokens) > 1 and not rl.context_steps:
        yield rl.steps, rl.context_tokens[-1]
        return
    curriculum = ContextCurriculum(rl)
    limits = [curriculum.limit(step) for step in range(1, rl.steps + 1)]
    for limit in dict.fromkeys(limits):
        yield limits.count(limit), limit


def run_hours(
    config: Config,
    shape: ModelShape,
    rates: Rates,
    workload: Workload,
    *,
    train_gpus: int,
    rollout_gpus: int,
    end: End = "value",
) -> tuple[float, list[tuple[int, StepHours]]]:
    """GPU-hours of a run, and (steps, a step) of each context length."""
    parts = [
        (
            steps,
            step_hours(
                config,
                shape,
                rates,
                workload,
                train_gpus=train_gpus,
                rollout_gpus=rollout_gpus,
                limit=limit,
                end=end,
            ),  # fmt: skip
        )
        for steps, limit in context_stages(config)
    ]
    return sum(steps * step.gpu_hours for steps, step in parts), parts
