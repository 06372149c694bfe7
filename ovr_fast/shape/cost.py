"""The one cost function: floating-point operations of each part of the model, by shape alone.

Packing, balance over ranks, the split of layers over pipeline stages, and the FLOP and MFU counters
all ask here. A multiply-add counts as two operations; norms, rotations and activations are not
counted; recomputation is not either, so that MFU compares runs with and without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ovr_fast.settings import ConfigError
from ovr_fast.shape.model_shape import ModelShape, VisionShape

TYPICAL_TOKENS = 8192
"""Length at which head and layers are weighed against each other for the pipeline split: that of
the recipe's responses in its first half (OVR, figure 4: 7 to 10 thousand tokens)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """What a rollout goes through in a step, in units of one forward pass (a backward is two)."""

    decoder: float  # embedding and layers, of actor, critic and reference together
    head: int  # the output head, which the critic does not have


def layer_flops(shape: ModelShape, tokens: int) -> float:
    """Forward pass of one decoder layer over one sequence: products linear in its tokens, causal
    attention quadratic."""
    return projection_flops(shape, tokens) + 2.0 * tokens**2 * shape.hidden


def projection_flops(shape: ModelShape, tokens: int) -> float:
    """Of a decoder layer, the products with its weights: all but attention."""
    kv = shape.kv_heads * shape.head_dim
    return 2.0 * tokens * shape.hidden * (2 * shape.hidden + 2 * kv + 3 * shape.intermediate)


def head_flops(shape: ModelShape, rows: int) -> float:
    """Forward pass of the output head over ``rows`` response tokens."""
    return 2.0 * rows * shape.hidden * shape.vocab


def sequence_flops(shape: ModelShape, tokens: int, rows: int, passes: Passes) -> float:
    """All passes of a step over one rollout of ``tokens``, ``rows`` of them response tokens."""
    trunk = passes.decoder * shape.layers * layer_flops(shape, tokens)
    return trunk + passes.head * head_flops(shape, rows)


def prefix_flops(shape: ModelShape, tokens: int, passes: Passes) -> float:
    """Of all passes of a step, what each response but one spares where a microbatch has their
    prompt of ``tokens`` once: all but attention, which is made with every response."""
    return passes.decoder * shape.layers * projection_flops(shape, tokens)


def tower_flops(grid: tuple[int, int, int], shape: VisionShape) -> float:
    """Forward pass of the vision tower and merger over one image.

    ``a p^2 + b p`` in its patches p: the few layers of full attention are quadratic, windowed
    attention and everything else linear.
    """
    t, h, w = grid
    frame, patches = h * w, t * h * w
    hidden, merged = shape.hidden, shape.hidden * shape.merge_size**2
    window = (shape.window_size // shape.patch_size) ** 2
    whole = len(shape.full_attention_layers)
    products = shape.layers * (4 * hidden**2 + 3 * hidden * shape.intermediate)
    products += shape.patch_dim * hidden
    products += (merged**2 + merged * shape.out_hidden) // shape.merge_size**2
    keys = whole * frame + (shape.layers - whole) * min(window, frame)
    return 2.0 * patches * products + 4.0 * patches * hidden * keys


def split_layers(shape: ModelShape, stages: int, *, head: bool) -> list[range]:
    """Which layers each pipeline stage owns, so that the slowest stage is as fast as can be.

    The last stage also has the output head (an actor's; a critic's is nothing). The vision tower
    counts for no stage: all ranks share its images. Where layers do not divide evenly the first
    stages get fewer, since one-forward-one-backward keeps most activations there.

    Raises:
        ConfigError: more stages than layers.
    """
    layers = shape.layers
    if stages > layers:
        raise ConfigError(f"parallel.pipeline={stages} is more than the {layers} layers")
    weight = 0.0
    if head:
        weight = head_flops(shape, TYPICAL_TOKENS) / layer_flops(shape, TYPICAL_TOKENS)
    others = stages - 1
    sizes = [layers]
    if others:
        last = min(
            range(layers - others, 0, -1),
            key=lambda size: max(-(-(layers - size) // others), size + weight),
        )
        base, extra = divmod(layers - last, others)
        sizes = [base + (others - stage <= extra) for stage in range(others)] + [last]
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 peak of a GPU by a word in its name, 1e12 operations a second (vendor data sheets)."""


def peak_tflops(device_name: str) -> float | None:
    """The peak that MFU is measured against; None for a device that is not in the table."""
    return next((peak for word, peak in PEAK_TFLOPS.items() if word in device_name), None)
