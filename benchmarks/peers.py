"""What each operator is measured beside. A peer that cannot run here says so; none is left out.

A case is one way to do one operator's work at one shape. ``build`` makes inputs and returns a
function without arguments that does the work once, on the next of several input sets, so that no
set stays in a cache. ``Missing`` is raised with the reason where a peer cannot run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ovr_kernels import reference, streaming
from ovr_kernels.artefacts import HIDDEN as MODEL_HIDDEN
from ovr_kernels.artefacts import INTERMEDIATE as MODEL_INTERMEDIATE
from ovr_kernels.objective import PolicyObjective

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
SETS = 3 if GPU else 1

# Qwen2.5-VL-7B on a GPU, as it is predicted; on a CPU something that ends in seconds.
ROWS, HIDDEN, VOCAB = (streaming.ROWS, MODEL_HIDDEN, streaming.VOCAB) if GPU else (256, 64, 8192)
TOKENS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = (
    (*streaming.LAYER, MODEL_INTERMEDIATE) if GPU else (512, 4, 2, 16, 128)
)
GAE_TOKENS, GAE_SEQUENCES = (streaming.GAE_TOKENS, streaming.GAE_SEQUENCES) if GPU else (20_000, 8)
LOSS_TOKENS = streaming.LOSS_TOKENS if GPU else 20_000
CHUNK = 8192 if GPU else 128


class Missing(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measurement."""

    operator: str
    peer: str
    build: Callable[[], Callable[[], object]]
    operations: float = 0.0  # counted floating-point operations of the work
    bytes: float = 0.0  # counted bytes that have to move


def operators():
    """Our operators on this device: Triton on a GPU, else the reference."""
    if not GPU:
        return reference
    from ovr_kernels import fused

    return fused


def draw(*shape: int, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> list[Tensor]:
    """Random input sets."""
    generator = torch.Generator(DEVICE).manual_seed(len(shape) + shape[0])
    return [
        (torch.randn(*shape, generator=generator, device=DEVICE) * scale).to(dtype)
        for _ in range(SETS)
    ]


def needs_gpu() -> None:
    if not GPU:
        raise Missing("needs a GPU")


def liger():
    """Liger's operators."""
    needs_gpu()
    try:
        import liger_kernel.ops as ops
    except ImportError as error:
        raise Missing(f"liger-kernel is not installed ({error})") from error
    return ops


# ---- the head -----------------------------------------------------------------------------------


def head_inputs() -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Hidden states with gradients, the weight, targets."""
    hidden = [x.requires_grad_() for x in draw(ROWS, HIDDEN)]
    weight = draw(VOCAB, HIDDEN, scale=3.0 / HIDDEN**0.5)[0].requires_grad_()
    targets = torch.randint(VOCAB, (ROWS,), device=DEVICE)
    turn = itertools.cycle(hidden)
    return lambda: (next(turn), weight, targets)


def forward_of(logprob: Callable) -> Callable[[], Callable]:
    def build() -> Callable:
        inputs = head_inputs()

        def run() -> object:
            with torch.no_grad():
                return logprob(*inputs())

        return run

    return build


def step_of(loss: Callable) -> Callable[[], Callable]:
    """Loss, forward and backward, gradients thrown away."""

    def build() -> Callable:
        inputs = head_inputs()
        advantages = torch.randn(ROWS, device=DEVICE)

        def run() -> object:
            hidden, weight, targets = inputs()
            hidden.grad = weight.grad = None
            loss(hidden, weight, targets, advantages).backward()
            return hidden.grad

        return run

    return build


def naive_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits in fp32 at once, as plain trainers do."""
    logits = (hidden @ weight.t()).float()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def in_chunks(size: int) -> Callable:
    """The usual loop over chunks of tokens with eager softmax."""

    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([naive_logprob(h, weight, t) for h, t in parts])

    return logprob


def compiled_logprob() -> Callable:
    needs_gpu()
    return torch.compile(naive_logprob)


def policy_of(logprob: Callable) -> Callable:
    """The on-policy loss on somebody's log-probs."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
        found = logprob(hidden, weight, targets)
        return reference.policy_loss(found, advantages, PolicyObjective(), weights=1.0 / ROWS)[0]

    return loss


def our_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    return operators().linear_policy_loss(
        hidden, weight, targets, PolicyObjective(), advantages=advantages, weights=1.0 / ROWS,
        chunk=CHUNK,
    )[0]  # fmt: skip


def into_a_buffer(operator: str, *settings: object, **tokens: Tensor) -> Callable[[], Callable]:
    """As the trainer calls a loss: the weight's gradient goes into a buffer that is there."""

    def build() -> Callable:
        buffer = torch.zeros(VOCAB, HIDDEN, device=DEVICE)

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
            if operator == "linear_gspo_loss":  # one a response
                tokens["advantages"] = advantages[: tokens["cu_seqlens"].numel() - 1]
            elif operator == "linear_policy_loss":
                tokens["advantages"] = advantages
            return getattr(operators(), operator)(
                hidden, weight, targets, *settings, **tokens, weights=1.0 / ROWS,
                weight_gradient=buffer, chunk=CHUNK,
            )[0]  # fmt: skip

        return step_of(loss)()

    return build


def four_products(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    """Our own kernels on the recomputing route."""
    logprobs = operators().linear_logprob(hidden, weight, targets, chunk=CHUNK)
    return operators().policy_loss(logprobs, advantages, PolicyObjective(), weights=1.0 / ROWS)[0]


def rows_peer(train: bool) -> Callable[[], Callable]:
    """Baseline: cuBLAS on large chunks, then one kernel over rows of bf16 logits."""

    def build() -> Callable:
        needs_gpu()
        from row_kernel import chunked_rows

        inputs = head_inputs()
        advantages = torch.randn(ROWS, device=DEVICE) if train else None

        def run() -> object:
            with torch.no_grad():
                return chunked_rows(*inputs(), advantages=advantages, chunk=min(CHUNK, 4096))

        return run

    return build


def liger_cross_entropy() -> Callable:
    """Liger's fused linear cross-entropy, what most users run; no policy loss, no entropy."""
    ops = liger()
    inputs = head_inputs()

    def run() -> object:
        hidden, weight, targets = inputs()
        hidden.grad = weight.grad = None
        ops.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0].backward()
        return hidden.grad

    return run


def bare_products(count: int) -> Callable[[], Callable]:
    """The yardstick: that many matrix products of the head's shape by the vendor's library."""

    def build() -> Callable:
        inputs = head_inputs()
        logits = draw(ROWS, VOCAB)[0]

        def run() -> object:
            hidden, weight, _ = inputs()
            with torch.no_grad():
                found: object = hidden @ weight.t()
                if count == 3:
                    found = logits @ weight, logits.t() @ hidden
            return found

        return run

    return build


def head_cases() -> list[Case]:
    product = 2.0 * ROWS * HIDDEN * VOCAB
    forward = dict(operator="linear_logprob forward", operations=product)
    step = dict(operator="linear_policy_loss step", operations=3 * product)
    ours = operators().linear_logprob
    responses = torch.linspace(0, ROWS, 9).long()
    return [
        Case(peer="matrix product alone", build=bare_products(1), **forward),
        Case(
            peer="ours",
            build=forward_of(lambda h, w, t: ours(h, w, t, return_entropy=True)),
            **forward,
        ),
        Case(peer="chunked cuBLAS + row kernel", build=rows_peer(train=False), **forward),
        Case(peer="512-token chunks", build=forward_of(in_chunks(512)), **forward),
        Case(peer="naive torch", build=forward_of(naive_logprob), **forward),
        Case(
            peer="torch.compile", build=lambda: forward_of(compiled_logprob())(), **forward
        ),
        Case(peer="three matrix products alone", build=bare_products(3), **step),
        Case(peer="ours", build=step_of(our_policy_loss), **step),
        Case(
            peer="ours, into a gradient buffer",
            build=into_a_buffer("linear_policy_loss", PolicyObjective()), **step,
        ),
        Case(peer="ours, recomputing (four products)", build=step_of(four_products), **step),
        Case(peer="chunked cuBLAS + row kernel", build=rows_peer(train=True), **step),
        Case(peer="512-token chunks", build=step_of(policy_of(in_chunks(512))), **step),
        Case(peer="naive torch", build=step_of(policy_of(naive_logprob)), **step),
        Case(
            peer="torch.compile", build=lambda: step_of(policy_of(compiled_logprob()))(), **step
        ),
        Case(peer="Liger (cross-entropy alone)", build=liger_cross_entropy, **step),
        Case(
            operator="linear_cross_entropy step", peer="ours, into a gradient buffer",
            build=into_a_buffer("linear_cross_entropy"), operations=3 * product,
        ),
        Case(
            operator="linear_gspo_loss step", peer="ours, into a gradient buffer",
            build=into_a_buffer("linear_gspo_loss", cu_seqlens=responses), operations=3 * product,
        ),
    ]  # fmt: skip


# ---- the small operators ------------------------------------------------------------------------


def policy_cases() -> list[Case]:
    def build_with(chosen: Callable) -> Callable[[], Callable]:
        def build() -> Callable:
            loss = chosen()
            logprobs = [x.requires_grad_() for x in draw(LOSS_TOKENS, dtype=torch.float32)]
            advantages, old = (draw(LOSS_TOKENS, dtype=torch.float32)[0] for _ in range(2))
            turn = itertools.cycle(logprobs)

            def run() -> object:
                x = next(turn)
                x.grad = None
                loss(x, advantages, PolicyObjective(), old_logprobs=old)[0].backward()
                return x.grad

            return run

        return build

    def compiled() -> Callable:
        needs_gpu()
        return torch.compile(reference.policy_loss)

    def values_with(chosen: Callable) -> Callable[[], Callable]:
        def build() -> Callable:
            loss = chosen()
            values = itertools.cycle(
                [x.requires_grad_() for x in draw(LOSS_TOKENS, dtype=torch.float32)]
            )
            returns, old = (draw(LOSS_TOKENS, dtype=torch.float32)[0] for _ in range(2))

            def run() -> object:
                x = next(values)
                x.grad = None
                loss(x, returns, old_values=old, clip_eps=0.2).backward()
                return x.grad

            return run

        return build

    # Three arrays read, one gradient written: the least that a loss and its backward move.
    policy = dict(operator="policy_loss", bytes=16.0 * LOSS_TOKENS)
    value = dict(operator="value_loss", bytes=16.0 * LOSS_TOKENS)
    return [
        Case(peer="ours", build=build_with(lambda: operators().policy_loss), **policy),
        Case(peer="eager torch", build=build_with(lambda: reference.policy_loss), **policy),
        Case(peer="torch.compile", build=build_with(compiled), **policy),
        Case(peer="ours", build=values_with(lambda: operators().value_loss), **value),
        Case(peer="eager torch", build=values_with(lambda: reference.value_loss), **value),
    ]


def gae_cases() -> list[Case]:
    def build_with(gae: Callable, gae_lambda: float) -> Callable[[], Callable]:
        def build() -> Callable:
            rewards, values = (draw(GAE_TOKENS, dtype=torch.float32)[0] for _ in range(2))
            ends = torch.linspace(0, GAE_TOKENS, GAE_SEQUENCES + 1).long()
            return lambda: gae(rewards, values, ends, gamma=1.0, gae_lambda=gae_lambda)

        return build

    def loop_build() -> Callable:
        if GPU:
            raise Missing("the plain loop takes minutes at this size")
        return build_with(reference.packed_gae, 0.95)()

    closed = dict(operator="packed_gae, closed form", bytes=16.0 * GAE_TOKENS)
    general = dict(operator="packed_gae", bytes=16.0 * GAE_TOKENS)
    ours = operators().packed_gae
    return [
        Case(peer="ours", build=build_with(ours, 1.0), **closed),
        Case(peer="eager torch", build=build_with(reference.packed_gae, 1.0), **closed),
        Case(peer="ours", build=build_with(ours, 0.95), **general),
        Case(peer="plain loop", build=loop_build, **general),
    ]


def rotary_cases() -> list[Case]:
    rotary = HEADS + KV_HEADS
    positions = torch.arange(TOKENS, device=DEVICE).repeat(3, 1)
    sections = (HEAD_DIM // 8, HEAD_DIM // 16 * 3, HEAD_DIM // 16 * 3)

    def ours() -> Callable:
        table = reference.mrope_table(base=1e6, head_dim=HEAD_DIM, sections=sections, device=DEVICE)
        heads = itertools.cycle(draw(TOKENS, rotary + KV_HEADS, HEAD_DIM))
        return lambda: operators().rotate(next(heads), positions, table, rotary_heads=rotary)

    def eager() -> Callable:
        from ovr_fast.torchvision_ops import declare_if_broken

        declare_if_broken()
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs

        q, k = draw(1, HEADS, TOKENS, HEAD_DIM)[0], draw(1, KV_HEADS, TOKENS, HEAD_DIM)[0]
        inverse = 1e6 ** (-torch.arange(0, HEAD_DIM, 2, device=DEVICE) / HEAD_DIM)
        angles = positions[:, None, :, None].float() * inverse
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
        if hasattr(theirs, "apply_multimodal_rotary_pos_emb"):
            return lambda: theirs.apply_multimodal_rotary_pos_emb(q, k, cos, sin, list(sections))
        return lambda: theirs.apply_rotary_pos_emb(q, k, cos[0], sin[0])  # 5.18 and later

    counted = dict(
        operator="rotate", bytes=2.0 * TOKENS * rotary * HEAD_DIM * DTYPE.itemsize + 24.0 * TOKENS
    )
    return [
        Case(peer="ours", build=ours, **counted),
        Case(peer="transformers eager", build=eager, **counted),
    ]


def layer_cases() -> list[Case]:
    """RMS norm, alone and with the residual addition, and SwiGLU; forward and backward."""

    def norm_alone(chosen: Callable) -> Callable[[], Callable]:
        def build() -> Callable:
            rms_norm = chosen()
            inputs = itertools.cycle([x.requires_grad_() for x in draw(TOKENS, HIDDEN)])
            upstream, weight = draw(TOKENS, HIDDEN)[0], draw(HIDDEN)[0].requires_grad_()

            def run() -> object:
                x = next(inputs)
                x.grad = weight.grad = None
                rms_norm(x, weight, 1e-6).backward(upstream)
                return x.grad

            return run

        return build

    def norm(chosen: Callable) -> Callable[[], Callable]:
        def build() -> Callable:
            add_norm = chosen()
            inputs = itertools.cycle([x.requires_grad_() for x in draw(TOKENS, HIDDEN)])
            residual, weight = draw(TOKENS, HIDDEN)[0], draw(HIDDEN)[0].requires_grad_()

            def run() -> object:
                x = next(inputs)
                x.grad = weight.grad = None
                both = add_norm(x, residual, weight, 1e-6)
                torch.autograd.backward(both, (residual, residual))
                return x.grad

            return run

        return build

    def liger_norm() -> Callable:
        function = liger().LigerFusedAddRMSNormFunction
        return lambda x, r, w, eps: function.apply(x, r, w, eps, 0.0, "llama", False)

    def gated(chosen: Callable) -> Callable[[], Callable]:
        def build() -> Callable:
            swiglu = chosen()
            inputs = itertools.cycle([x.requires_grad_() for x in draw(TOKENS, 2 * INTERMEDIATE)])
            upstream = draw(TOKENS, INTERMEDIATE)[0]

            def run() -> object:
                x = next(inputs)
                x.grad = None
                swiglu(x).backward(upstream)
                return x.grad

            return run

        return build

    def liger_swiglu() -> Callable:
        function = liger().LigerSiLUMulFunction
        return lambda x: function.apply(*x.chunk(2, dim=-1))

    size = float(DTYPE.itemsize)
    alone = dict(operator="rms_norm step", bytes=5 * size * TOKENS * HIDDEN)
    norms = dict(operator="add_rms_norm step", bytes=8 * size * TOKENS * HIDDEN)
    gates = dict(operator="swiglu step", bytes=8 * size * TOKENS * INTERMEDIATE)
    return [
        Case(peer="ours", build=norm_alone(lambda: operators().rms_norm), **alone),
        Case(peer="eager torch", build=norm_alone(lambda: reference.rms_norm), **alone),
        Case(peer="ours", build=norm(lambda: operators().add_rms_norm), **norms),
        Case(peer="eager torch", build=norm(lambda: reference.add_rms_norm), **norms),
        Case(peer="Liger", build=norm(liger_norm), **norms),
        Case(peer="ours", build=gated(lambda: operators().swiglu), **gates),
        Case(peer="eager torch", build=gated(lambda: reference.swiglu), **gates),
        Case(peer="Liger", build=gated(liger_swiglu), **gates),
    ]


def attention_cases() -> list[Case]:
    """One sequence of 16,384 tokens, grouped queries of 28 and 4 heads, as the decoder has it."""
    from ovr_fast.model import attention
    from ovr_fast.records import Segments

    tokens = TOKENS // 2
    segments = Segments.of([tokens]).to(DEVICE)

    def build_with(attend: Callable, *, train: bool) -> Callable[[], Callable]:
        def build() -> Callable:
            heads = [x.requires_grad_() for x in draw(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)]
            upstream = draw(tokens, HEADS, HEAD_DIM)[0]
            turn = itertools.cycle(heads)

            def run() -> object:
                packed = next(turn)
                packed.grad = None
                with torch.set_grad_enabled(train):
                    out = attend(*packed.split([HEADS, KV_HEADS, KV_HEADS], 1))
                if train:
                    out.backward(upstream)
                return out

            return run

        return build

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.packed_attention(q, k, v, segments, causal=True)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        needs_gpu()
        bounds = segments.cu_seqlens_S1
        return attention._together(q, k, v, attention.Ends(bounds, bounds, tokens, tokens), True)

    forward = 2.0 * tokens * tokens * HEADS * HEAD_DIM  # two products, half of each causal
    cases = []
    for name, train, work in (("forward", False, 1.0), ("step", True, 3.5)):
        counted = dict(operator=f"attention {name}", operations=work * forward)
        cases += [
            Case(peer="ours", build=build_with(ours, train=train), **counted),
            Case(peer="FlashAttention 2 of torch", build=build_with(flash, train=train), **counted),
        ]
    return cases


def all_cases() -> list[Case]:
    return [
        *head_cases(),
        *policy_cases(),
        *gae_cases(),
        *rotary_cases(),
        *layer_cases(),
        *attention_cases(),
    ]
