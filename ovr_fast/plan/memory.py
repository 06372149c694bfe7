"""What a run holds in memory: the arithmetic behind ``--dry-run``."""

from __future__ import annotations

from dataclasses import dataclass

from ovr_fast.config import FROZEN_PARTS, Config
from ovr_fast.plan.layout import check_layout
from ovr_fast.shape.cost import split_layers
from ovr_fast.shape.model_shape import ModelShape

GIB = 2**30
HEAD_CHUNK = 8192
"""Rows whose logits the head holds at a time: ``ovr_kernels.linear_policy_loss.CHUNK``, which a
machine without Triton cannot import."""

GAPS = 1.1
"""What torch's allocator holds over its peak: 3 to 21 % in rehearsals (benchmarks/rehearsal.py),
the more the emptier the card; near its end the allocator gives back what it does not use."""
PARTS = ("language", "tower", "merger")
CARD_GIB = 79.6
"""Of an H100, as its driver reports it."""
BESIDE_GIB = 2.4
"""Context, kernels, cuBLAS and NCCL of a trainer on an H100 (benchmarks/results/h100_step.json)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the fullest rank holds while it trains, GiB, by class; vLLM is not among it."""

    weights: float  # of the models that stay on the device, vision tower included
    gradients: float  # fp32, of the models that stay
    optimizer: float  # fp32 master weights (none beside fp32 models) and two moments, sharded
    activations: float  # kept for the backward of the microbatches in flight
    layer: float  # a layer's backward, what it computes again included
    head: float  # last states, gathered, and their gradient; the logits of one chunk
    waiting: float  # on the device while vLLM generates
    host: float  # of what waits there, while vLLM generates
    checkpoint: float  # copies on the host, until a checkpoint is written
    server: float  # weights of a sleeping server, on the host

    @property
    def resident(self) -> float:
        """What an update finds on the device."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """At the worst moment: the head's, before the layers' backward, or a layer's."""
        return self.resident + self.activations + max(self.layer, self.head)

    @property
    def largest(self) -> str:
        """The class that has most, where the plan is at its worst."""
        moment = "layer" if self.layer > self.head else "head"
        names = ("weights", "gradients", "optimizer", "activations", moment)
        return max(names, key=lambda name: getattr(self, name))

    @property
    def card(self) -> float:
        """What the card must have: with the allocator's gaps and what a process has beside it."""
        return self.total * GAPS + BESIDE_GIB

    @property
    def host_total(self) -> float:
        """Of a rank, while a checkpoint is written: pinned buffers are kept once they are made."""
        return self.host + self.checkpoint + self.server


def memory_plan(config: Config, shape: ModelShape, world: int, *, recipe_stage: str) -> MemoryPlan:
    """The arithmetic of what fits, for ``recipe_stage`` "cold_start" or "rl".

    It counts tensors, to within a few per cent of the allocator's peak (benchmarks/rehearsal.py).
    The card gives more: see ``MemoryPlan.card``.
    """
    dp = check_layout(config, shape, world)
    tp, pp = config.parallel.tensor, config.parallel.pipeline
    element = 2 if config.model.dtype == "bfloat16" else 4
    frozen = recipe_stage == "cold_start" or config.model.train_vision == "frozen"
    state = (8 if element == 4 else 12) / dp
    if recipe_stage == "rl":
        tokens = config.rl.max_tokens_per_microbatch
        heads = [True, False] if config.rl.has_critic else [True]  # actor, critic
        offload = config.parallel.offload
        references = int(config.rl.kl_coef != 0)
    else:
        tokens, heads, offload, references = config.cold_start.row_tokens, [True], "none", 0
    counts = shape.parameter_counts()
    vision = (counts["tower"] + counts["merger"]) * element
    server = 0.0
    if recipe_stage == "rl" and config.rollout.placement == "colocated":
        server = 2.0 * sum(counts[part] for part in PARTS) / config.rollout.tensor
    plans = []
    for pp_rank in range(pp):
        sizes = []  # of the language model's shard here, a model
        layers = []
        for head in heads:
            own = split_layers(shape, pp, head=head)[pp_rank]
            embeddings = (pp_rank == 0) + (head and pp_rank == pp - 1)
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
        in_flight = min(pp - pp_rank, pp)
        kept = _kept_bytes(shape, config.model.recompute, element, tp) * tokens
        kept *= max(layers) * in_flight
        layer = _backward_bytes(shape, config.model.recompute, element, tp, tokens)
        chunk = min(HEAD_CHUNK, tokens) * (shape.vocab // tp) * element
        output = (pp_rank == pp - 1) * (3 * tokens * shape.hidden * element + chunk)
        resident = max if offload != "none" else sum
        plans.append(
            MemoryPlan(
                weights=((max if offload == "model" else sum)(here) + reference + towers) / GIB,
                gradients=4 * resident(trained) / GIB,
                optimizer=state * resident(trained) / GIB,
                activations=kept / GIB,
                layer=layer / GIB,
                head=output / GIB,
                waiting=(
                    towers
                    + reference
                    + (offload != "model") * sum(here)
                    + (offload == "none") * (4 + state) * sum(trained)
                )
                / GIB,
                host=((offload != "none") * state * sum(trained) + (offload == "model") * sum(here))
                / GIB,
                checkpoint=12 / dp * sum(trained) / GIB,
                server=server / GIB,
            )
        )
    return max(plans, key=lambda plan: plan.total)


def _kept_bytes(shape: ModelShape, recompute: str, element: int, tp: int) -> float:
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


def _backward_bytes(shape: ModelShape, recompute: str, element: int, tp: int, tokens: int) -> float:
    """What one layer's backward needs beside what is kept: what it computes again, and where it is
    largest, behind SwiGLU, gradients of its input and result, of the layer's input and output
    (whole sequences, under sequence parallelism gathered once more), and of the projection's
    weight."""
    h, wide = shape.hidden, shape.intermediate
    again = _kept_bytes(shape, "none", element, tp) - _kept_bytes(shape, recompute, element, tp)
    gathered = (2 + (tp > 1)) * h
    return tokens * (max(again, 0.0) + element * (gathered + 2 * wide / tp)) + (
        element * 2 * wide * h / tp
    )
