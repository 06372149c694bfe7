"""Each Triton operator against its reference, on this device, at a run's own shapes.

A trainer runs this once at its start: a compiler or driver that miscompiles a kernel ends the run
with the operator's name, before a single step is trained on wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ovr_kernels import fused, reference
from ovr_kernels.objective import KINDS, KL_ESTIMATORS, PolicyObjective

ROWS = 300
"""Not a multiple of any tile."""


class ParityError(RuntimeError):
    """An operator differs from its reference. The message names it, what differs, by how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """A run's own: sizes of the model on one rank, and what its operators are given."""

    hidden: int
    vocab: int
    intermediate: int
    heads: int
    head_dim: int
    rope_base: float
    sections: tuple[int, int, int]
    vision_hidden: int
    vision_intermediate: int
    vision_head_dim: int
    temperature: float = 1.0


def check_parity(
    shapes: Shapes, *, device: torch.device, dtype: torch.dtype, operators=fused
) -> None:
    """Compare every operator of ``operators``, forward and backward, with its reference.

    Raises:
        ParityError: a result differs by more than its tolerance.
    """
    for name, run, tolerance in _cases(shapes, device, dtype):
        for (what, found), (_, wanted) in zip(run(operators), run(reference), strict=True):
            error = relative_error(found, wanted)
            if not error <= tolerance:
                raise ParityError(
                    f"{name}: {what} differs from the reference by {error:.1e} (relative norm, "
                    f"allowed {tolerance:.0e}) in {dtype} on {device}; run with "
                    'model.kernels="reference" and report the GPU and the Triton version'
                )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 error of ``found``; NaN propagates."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _cases(
    shapes: Shapes, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable, float]]:
    """(operator, function from a set of operators to named results, tolerance)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, kind: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, kind)

    hidden, vocab, temperature = shapes.hidden, shapes.vocab, shapes.temperature
    exact = 1e-5
    rounded = 3e-6 if dtype is torch.float32 else 6e-3
    states, weight = draw(ROWS, hidden), draw(vocab, hidden, scale=3.0 / hidden**0.5)
    targets = (torch.arange(ROWS, device=device) * 7919) % vocab
    advantages = draw(ROWS, kind=torch.float32)
    objective = PolicyObjective(entropy_coef=0.01, kl_coef=0.05)

    def leaf(tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    def logprob(operators):
        with torch.no_grad():
            found, entropy = operators.linear_logprob(
                states, weight, targets, temperature=temperature, return_entropy=True
            )
        yield "log-prob", found
        yield "entropy", entropy

    def logprob_gradients(operators):
        x, w = leaf(states), leaf(weight)
        found, entropy = operators.linear_logprob(
            x, w, targets, temperature=temperature, return_entropy=True
        )
        (found * advantages + 0.1 * entropy).sum().backward()
        yield "gradient of hidden", x.grad
        yield "gradient of weight", w.grad

    def policy_loss(operators, x, w):
        return operators.linear_policy_loss(
            x,
            w,
            targets,
            objective,
            advantages=advantages,
            ref_logprobs=known,
            weights=1.0 / ROWS,
            temperature=temperature,
        )

    def policy(operators):
        x, w = leaf(states), leaf(weight)
        loss, _ = policy_loss(operators, x, w)
        loss.backward()
        yield "gradient of hidden", x.grad
        yield "gradient of weight", w.grad
        buffer, x = torch.zeros_like(weight, dtype=torch.float32), leaf(states)
        operators.linear_cross_entropy(
            x, weight, targets, weights=1.0 / ROWS, weight_gradient=buffer
        )[0].backward()
        yield "gradient of hidden, cross-entropy", x.grad
        yield "gradient in a buffer", buffer

    def policy_statistics(operators):
        with torch.no_grad():
            loss, found = policy_loss(operators, states, weight)
        yield "loss", loss
        yield "totals", found.totals
        yield "log-prob", found.logprobs

    with torch.no_grad():
        known = reference.linear_logprob(states, weight, targets, temperature=temperature)
        assert isinstance(known, Tensor)
        known = known - 0.1
    yield "linear_logprob", logprob, exact
    yield "linear_logprob", logprob_gradients, rounded
    yield "linear_policy_loss", policy, rounded
    yield "linear_policy_loss", policy_statistics, exact

    old = known + draw(ROWS, kind=torch.float32, scale=0.3)

    def loss_alone(operators):
        x = leaf(known)
        loss, found = operators.policy_loss(
            x, advantages, PolicyObjective(dual_clip=3.0), old_logprobs=old
        )
        loss.backward()
        yield "loss", loss
        yield "gradient", x.grad
        yield "totals", found.totals

    shares = torch.rand(ROWS, generator=generator).to(device) / ROWS

    def objectives(operators):
        """Each kind of loss and of KL, with weights of each token."""
        for kind in KINDS:
            for estimator in KL_ESTIMATORS:
                x = leaf(known)
                loss, found = operators.policy_loss(
                    x,
                    advantages,
                    PolicyObjective(
                        kind=kind, clip_high=0.3, kl_coef=0.05, kl_estimator=estimator,
                        importance_cap=2.0,
                    ),
                    old_logprobs=old, rollout_logprobs=old - 0.1, ref_logprobs=old + 0.1,
                    weights=shares,
                )  # fmt: skip
                loss.backward()
                yield f"gradient, {kind}, {estimator}", x.grad
                yield f"totals, {kind}, {estimator}", found.totals

    def gspo(operators):
        x, buffer = leaf(states), torch.zeros_like(weight, dtype=torch.float32)
        loss, found = operators.linear_gspo_loss(
            x, weight, targets, advantages=advantages[:3], cu_seqlens=ends, old_logprobs=old,
            clip_low=0.2, clip_high=0.3, temperature=temperature, weight_gradient=buffer,
            return_entropy=True,
        )  # fmt: skip
        loss.backward()
        yield "gradient of hidden", x.grad
        yield "gradient in a buffer", buffer
        yield "entropy", found.entropies

    returns, near = draw(ROWS, kind=torch.float32), draw(ROWS, kind=torch.float32, scale=0.3)

    def value(operators):
        x = leaf(advantages)
        loss = operators.value_loss(x, returns, old_values=advantages + near, clip_eps=0.2)
        loss.backward()
        yield "loss", loss
        yield "gradient", x.grad

    ends = torch.tensor([0, 1, 130, ROWS])

    def gae(operators):
        for gamma, gae_lambda in ((1.0, 1.0), (0.99, 0.95)):
            found = operators.packed_gae(advantages, old, ends, gamma=gamma, gae_lambda=gae_lambda)
            yield from zip(("advantages", "returns"), found, strict=True)

    yield "policy_loss", loss_alone, exact
    yield "policy_loss", objectives, exact
    yield "linear_gspo_loss", gspo, rounded
    yield "value_loss", value, exact
    yield "packed_gae", gae, exact

    places = torch.arange(3 * ROWS, device=device).view(3, ROWS) * 40

    def rotary(table, heads, positions):
        def run(operators):
            x = leaf(heads)
            out = operators.rotate(
                x * 1.0, positions, table, rotary_heads=max(1, heads.shape[1] - 1)
            )
            (out.float() * heads.float().flip(0)).sum().backward()
            yield "heads", out
            yield "gradient", x.grad

        return run

    language = reference.mrope_table(
        base=shapes.rope_base, head_dim=shapes.head_dim, sections=shapes.sections, device=device
    )
    yield "rotate", rotary(language, draw(ROWS, shapes.heads, shapes.head_dim), places), rounded
    vision = reference.axial_table(base=1e4, head_dim=shapes.vision_head_dim, device=device)
    yield "rotate", rotary(vision, draw(ROWS, 3, shapes.vision_head_dim), places[:2]), rounded

    def norm(width):
        hidden, other, scale = draw(ROWS, width), draw(ROWS, width), draw(width)

        def run(operators):
            x, r, w = leaf(hidden), leaf(other), leaf(scale)
            out, total = operators.add_rms_norm(x, r, w, 1e-6)
            (out.float() * other.float() + total.float()).sum().backward()
            yield "normalised sum", out
            yield "gradient of hidden, sum", x.grad
            yield "gradient of weight, sum", w.grad
            x, w = leaf(hidden), leaf(scale)
            out = operators.rms_norm(x, w, 1e-6)
            (out.float() * other.float()).sum().backward()
            yield "normalised", out
            yield "gradient of hidden", x.grad
            yield "gradient of weight", w.grad

        return run

    def gated(width):
        wide = draw(ROWS, 2 * width)

        def run(operators):
            x = leaf(wide)
            out = operators.swiglu(x)
            out.float().square().sum().backward()
            yield "product", out
            yield "gradient", x.grad

        return run

    for width in (shapes.hidden, shapes.vision_hidden):
        yield "rms_norm", norm(width), rounded
    for width in (shapes.intermediate, shapes.vision_intermediate):
        yield "swiglu", gated(width), rounded
