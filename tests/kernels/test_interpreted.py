"""Every Triton kernel in Triton's interpreter, on ragged shapes, against float64.

The interpreter runs the kernels' own source on CPU tensors; it shows wrong formulas, masks and
indices, not races or the compiler. float16 and float32 alone: its bfloat16 products are wrong.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from ovr_kernels import fused, head, parity, reference
from ovr_kernels.objective import PolicyObjective

CPU = torch.device("cpu")
SHAPES = parity.Shapes(
    hidden=72, vocab=1000, intermediate=88, heads=6, head_dim=16, rope_base=1e6,
    sections=(2, 3, 3), vision_hidden=32, vision_intermediate=20, vision_head_dim=12,
    temperature=0.7,
)  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is asked for without a value is full of NaN."""

    def fill(make):
        def poison(*args, **kwargs) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return poison

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple:
    """Log-probs and entropies in float64."""
    logs = (hidden.double() @ weight.double().t() / temperature).log_softmax(-1)
    counted = targets >= 0
    chosen = logs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return chosen.where(counted, 0.0), -(logs.exp() * logs).sum(-1).where(counted, 0.0)


def assert_fused_class(found: Tensor, wanted: Tensor, largest_logit: float) -> None:
    """Within 1e-5 (1 + |x|), and what float32 can tell apart at the size of the logits."""
    error = (found.double() - wanted).abs() - 2.0**-21 * largest_logit
    assert float((error / (1.0 + wanted.abs())).max()) <= 1e-5


def assert_gradient(found: Tensor, wanted: Tensor, tolerance: float = 3e-3) -> None:
    found, wanted = found.double().flatten(), wanted.double().flatten()
    assert float((found - wanted).norm() / wanted.norm()) <= tolerance
    assert float(torch.cosine_similarity(found, wanted, dim=0)) >= 0.99999


def rows(kind: str, count: int, vocab: int, width: int) -> tuple[Tensor, Tensor]:
    """Hidden states and weights in float16 whose logits have a given character."""
    generator = torch.Generator().manual_seed(count + vocab)
    hidden = torch.randn(count, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    if kind == "peaked":  # a logit of 40 above the rest
        weight[7] = hidden[0] * 40 / hidden[0].square().sum()
        hidden[:] = hidden[0]
    elif kind == "negative":  # all logits -1e4
        hidden[:, 0], weight[:, 0] = 100.0, -100.0
    elif kind == "duplicate":
        weight[:] = weight[0]
    return hidden.half(), weight.half()


@pytest.mark.parametrize(
    ("count", "vocab", "kind"),
    [
        (1, 1000, "plain"),
        (127, 1000, "peaked"),
        (128, 4608, "plain"),
        (129, 4609, "negative"),
        (5, 9300, "duplicate"),
        (8192, 1000, "plain"),
        (3, 151_936, "plain"),
    ],
)
def test_linear_logprob_is_in_the_fused_class(count: int, vocab: int, kind: str) -> None:
    hidden, weight = rows(kind, count, vocab, 16)
    targets = (torch.arange(count) * 997 + vocab - 1) % vocab
    targets[count // 2] = 7
    if count > 2:
        targets[1] = -100
    found, entropy = fused.linear_logprob(
        hidden, weight, targets, temperature=0.7, return_entropy=True
    )
    wanted, wanted_entropy = exact(hidden, weight, targets, 0.7)
    largest = 1e4 / 0.7 if kind == "negative" else 0.0
    assert_fused_class(found, wanted, largest)
    assert_fused_class(entropy, wanted_entropy, largest)
    assert (found <= 0).all()


def test_a_certain_targets_log_prob_is_not_above_zero() -> None:
    """A GPU fuses the product and the difference of an exponent, the interpreter rounds between
    them: here the statistics are those of a tile whose peak was rounded down."""
    scale = head.LOG2_E
    logit = torch.tensor([11.317, 23.77, 87.123, 3.3])
    peak = (logit * scale).nextafter(torch.tensor(-torch.inf))
    total = torch.exp2((logit.double() * scale - peak.double()).float()).nextafter(peak * 0)
    partial = torch.stack([peak, total, torch.zeros(4), logit])[None].contiguous()
    found = torch.empty(4, 4)
    head.merge_kernel[(1,)](
        partial, partial, torch.zeros(4).long(), found, 4, 1, scale, 1.0, FINISH=True,
        ENTROPY=True, VALUES=4, BLOCK=256,
    )  # fmt: skip
    exact = (logit.double() * scale - peak.double() - total.double().log2()) / scale
    assert (exact > 0).any()  # what the kernel would say
    assert (found[0] <= 0).all()
    assert (found[0] >= -1e-5).all()


def test_a_row_does_not_depend_on_the_others_and_runs_repeat() -> None:
    hidden, weight = rows("plain", 130, 5000, 24)
    wide = torch.zeros(130, 40, dtype=torch.float16)
    wide[:, 3:27] = hidden  # neither contiguous nor aligned
    targets = torch.arange(130) * 31
    first = fused.linear_logprob(wide[:, 3:27], weight, targets)
    assert torch.equal(first, fused.linear_logprob(hidden, weight, targets))
    for row in (0, 127, 129):
        alone = fused.linear_logprob(hidden[row : row + 1], weight, targets[row : row + 1])
        assert torch.equal(alone[0], first[row])


@pytest.mark.parametrize("kind", ["plain", "peaked"])
def test_linear_logprob_gradients(kind: str) -> None:
    hidden, weight = rows(kind, 131, 1000, 24)
    targets = (torch.arange(131) * 7) % 1000
    targets[5] = -1
    pull, push = torch.randn(131), torch.randn(131) * 0.1
    pull[9] = push[9] = 0.0
    found, wanted = [], []
    for operators, kinds, into in (
        (fused, torch.float16, found),
        (reference, torch.float64, wanted),
    ):
        x, w = (t.detach().clone().to(kinds).requires_grad_() for t in (hidden, weight))
        logprobs, entropies = operators.linear_logprob(
            x, w, targets, temperature=0.7, return_entropy=True, chunk=50
        )
        (logprobs * pull + entropies * push).sum().backward()
        into += [x.grad, w.grad]
    for a, b in zip(found, wanted, strict=True):
        assert_gradient(a, b)
    assert found[0][5].abs().sum() == found[0][9].abs().sum() == 0


def test_a_block_of_ignored_rows_is_zero_everywhere() -> None:
    hidden, weight = rows("plain", 140, 1000, 24)
    hidden.requires_grad_()
    targets = torch.arange(140).where(torch.arange(140) >= 128, -1)
    loss, found = fused.linear_cross_entropy(
        hidden, weight, targets, weights=0.1, return_entropy=True
    )
    loss.backward()
    assert (found.logprobs[:128] == 0).all()
    assert (found.entropies[:128] == 0).all()
    assert (hidden.grad[:128] == 0).all()
    assert (hidden.grad[128:].abs().sum(1) > 0).all()
    wanted, _ = exact(hidden.detach(), weight, targets, 1.0)
    torch.testing.assert_close(loss.double(), -0.1 * wanted.sum(), rtol=1e-5, atol=1e-5)


OBJECTIVES = {
    "ppo": PolicyObjective(),
    "clip-higher, dual": PolicyObjective(clip_low=0.1, clip_high=0.3, dual_clip=1.5),
    "cispo": PolicyObjective(kind="cispo"),
    "reinforce": PolicyObjective(kind="reinforce"),
    "importance": PolicyObjective(importance_cap=1.2),
    "kl and entropy": PolicyObjective(kl_coef=0.3, entropy_coef=0.05),
    "k1": PolicyObjective(kl_coef=0.3, kl_estimator="k1"),
    "k2": PolicyObjective(kl_coef=0.3, kl_estimator="k2"),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("on_policy", [True, False])
def test_policy_loss(objective: PolicyObjective, on_policy: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = 2500  # several programs
    logprobs, old, rollout, ref = -torch.rand(4, tokens, generator=generator) * 2
    given = dict(
        old_logprobs=None if on_policy else old,
        rollout_logprobs=rollout,
        ref_logprobs=ref,
        weights=torch.rand(tokens, generator=generator).where(torch.arange(tokens) % 5 > 0, 0.0),
    )
    advantages = torch.randn(tokens, generator=generator)
    entropies = torch.rand(tokens, generator=generator)
    results = []
    for operators in (fused, reference):
        x, h = logprobs.clone().requires_grad_(), entropies.clone().requires_grad_()
        loss, found = operators.policy_loss(x, advantages, objective, entropies=h, **given)
        loss.backward()
        bonus = torch.zeros(tokens) if h.grad is None else h.grad
        results.append([loss.detach(), x.grad, bonus, found.totals])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip: float | None) -> None:
    values, returns, old = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0))
    results = []
    for operators in (fused, reference):
        x = values.clone().requires_grad_()
        loss = operators.value_loss(x, returns, old_values=old, clip_eps=clip)
        loss.backward()
        results.append((loss.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.9)])
def test_packed_gae(gamma: float, gae_lambda: float) -> None:
    lengths = torch.tensor([1, 2, 1023, 1024, 1025, 3000])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rewards, values = torch.randn(2, int(ends[-1]), generator=torch.Generator().manual_seed(0))
    found = fused.packed_gae(rewards, values, ends, gamma=gamma, gae_lambda=gae_lambda)
    wanted = reference.packed_gae(rewards, values, ends, gamma=gamma, gae_lambda=gae_lambda)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) <= 2e-6


@pytest.mark.parametrize("objective", ["ppo", "kl and entropy", "importance"])
def test_linear_policy_loss_in_chunks(objective: str) -> None:
    hidden, weight = rows("plain", 131, 1000, 24)
    targets = (torch.arange(131) * 7) % 1000
    targets[5] = -1
    generator = torch.Generator().manual_seed(1)
    given = dict(
        advantages=torch.randn(131, generator=generator).where(torch.arange(131) % 4 > 0, 0.0),
        old_logprobs=torch.full((131,), -7.0),
        rollout_logprobs=torch.full((131,), -7.2),
        ref_logprobs=torch.full((131,), -6.9),
        weights=torch.rand(131, generator=generator),
        temperature=0.8,
    )
    results = []
    for operators, kind in ((fused, torch.float16), (reference, torch.float64)):
        x, w = (t.detach().clone().to(kind).requires_grad_() for t in (hidden, weight))
        loss, found = operators.linear_policy_loss(
            x, w, targets, OBJECTIVES[objective], chunk=50, **given
        )
        loss.backward()
        results.append((loss, x.grad, w.grad, found))
    (loss, by_x, by_w, found), (wanted, *gradients, statistics) = results
    torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-5, atol=1e-5)
    assert_gradient(by_x, gradients[0])
    assert_gradient(by_w, gradients[1])
    for name in ("logprobs", "entropies", "totals"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(statistics, name).double(), rtol=3e-5, atol=3e-5
        )


def test_rows_without_a_gradient_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped rows, rows without advantage and ignored rows are left out; the ratio of a first
    on-policy pass is exactly 1, and its log-probs are the bits of ``linear_logprob``."""
    hidden, weight = rows("plain", 20, 1000, 24)
    targets, counts = torch.arange(20), []
    targets[0] = -1
    hidden.requires_grad_()
    real = head.OperandGradients.add

    def count(self, gradients: Tensor, *args):
        counts.append(gradients.shape[0])
        return real(self, gradients, *args)

    monkeypatch.setattr(head.OperandGradients, "add", count)
    logprobs = fused.linear_logprob(hidden, weight, targets)
    advantages = torch.ones(20)
    advantages[1:4] = 0.0
    _, found = fused.linear_policy_loss(
        hidden, weight, targets, PolicyObjective(), advantages=advantages
    )
    assert counts == [16]
    assert torch.equal(found.logprobs, logprobs)
    for chunk in (7, 20):  # against old log-probs from a pass of their own
        _, first = fused.linear_policy_loss(
            hidden, weight, targets, PolicyObjective(), advantages=advantages,
            old_logprobs=logprobs, chunk=chunk,
        )  # fmt: skip
        assert torch.equal(first.logprobs, logprobs)
        assert float(first.totals[1]) == 19.0  # the ignored row weighs nothing
    counts.clear()
    fused.linear_policy_loss(hidden, weight, targets, PolicyObjective(), advantages=advantages)
    old = logprobs.clone()
    old[4:10] -= 1.0  # ratio e, advantage 1: clipped
    fused.linear_policy_loss(
        hidden, weight, targets, PolicyObjective(), advantages=advantages, old_logprobs=old
    )
    assert counts == [16, 10]


def test_a_weight_buffer_is_filled_in_the_forward() -> None:
    hidden, weight = rows("plain", 20, 1000, 24)
    hidden.requires_grad_()
    buffer = torch.ones(1000, 24)
    loss, _ = fused.linear_cross_entropy(
        hidden, weight, torch.arange(20), weights=0.05, weight_gradient=buffer, chunk=7
    )
    w = weight.double().requires_grad_()
    x = hidden.detach().double().requires_grad_()
    wanted, _ = reference.linear_cross_entropy(x, w, torch.arange(20), weights=0.05)
    wanted.backward()
    assert_gradient(buffer - 1.0, w.grad)
    loss.backward()
    assert_gradient(hidden.grad, x.grad)
    with pytest.raises(RuntimeError):
        (2 * fused.linear_cross_entropy(
            hidden, weight, torch.arange(20), weight_gradient=buffer
        )[0]).backward()  # fmt: skip


def test_rotation_turns_back() -> None:
    heads = torch.randn(7, 5, 12)
    table = reference.axial_table(base=1e4, head_dim=12, device=CPU)
    positions = torch.arange(14).view(2, 7)
    base = heads.clone().requires_grad_()
    turned = fused.rotate(base * 1.0, positions, table, rotary_heads=3)
    torch.testing.assert_close(
        turned.detach(), reference.rotate(heads, positions, table, rotary_heads=3)
    )
    turned.backward(turned.detach().clone())
    torch.testing.assert_close(base.grad, heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_parity_gate_passes(dtype: torch.dtype) -> None:
    parity.check_parity(SHAPES, device=CPU, dtype=dtype)


def test_wrong_operands_are_one_message() -> None:
    hidden, weight = rows("plain", 4, 1000, 24)
    with pytest.raises(ValueError, match=r"must be \[..., H\] and"):
        fused.linear_logprob(hidden[:, :8], weight, torch.arange(4))
    with pytest.raises(ValueError, match=r"must be \[4\] int64"):
        fused.linear_logprob(hidden, weight, torch.arange(4).float())
    with pytest.raises(ValueError, match="they must be equal"):
        fused.linear_logprob(hidden, weight.float(), torch.arange(4))


def test_both_forms_have_one_signature() -> None:
    for name in fused.__all__:
        ours, plain = (inspect.signature(getattr(form, name)) for form in (fused, reference))
        for a, b in zip(ours.parameters.values(), plain.parameters.values(), strict=True):
            assert a.kind == b.kind
            assert a.name == b.name or b.name.startswith(f"{a.name}_"), (name, a, b)
            assert a.default == b.default or a.name == "chunk", (name, a, b)


def test_logit_gradients_of_kept_rows_do_not_depend_on_the_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where every row has a gradient the rows are spread over programs, else one moves them (on a
    GPU; the interpreter's programs come one after another)."""
    grids: list[tuple[int, int]] = []

    class Watched:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    kernel = head.gradient_kernel
    monkeypatch.setattr(head, "gradient_kernel", Watched())
    hidden, weight = rows("plain", 75, 1000, 24)
    targets = torch.arange(75) * 13
    for counted in (torch.ones(75), (torch.arange(75) % 3 > 0).float()):
        results = []
        for run in (16, 48, 512):
            monkeypatch.setattr(head, "GRADIENT_ROWS", run)
            x, w = (t.detach().clone().requires_grad_() for t in (hidden, weight))
            fused.linear_cross_entropy(x, w, targets, weights=counted)[0].backward()
            results.append((x.grad, w.grad))
        for by_hidden, by_weight in results[1:]:
            assert torch.equal(by_hidden, results[0][0])
            assert torch.equal(by_weight, results[0][1])
        assert torch.equal(results[0][0].abs().sum(1) > 0, counted > 0)
    assert [runs for _, runs in grids] == [5, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("used", ["out", "total", "both"])
@pytest.mark.parametrize("needs", ["hidden", "residual", "weight", "all"])
def test_add_rms_norm_gradients_of_what_is_used_and_needed(used: str, needs: str) -> None:
    """And nothing else is made."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(5, 72, generator=generator) for _ in range(2)]
    given.append(torch.randn(72, generator=generator))
    above = torch.randn(2, 5, 72, generator=generator)
    asked = [needs in (name, "all") for name in ("hidden", "residual", "weight")]
    results = []
    for operators, kind in ((fused, torch.float32), (reference, torch.float64)):
        x, r, w = (
            t.to(kind, copy=True).requires_grad_(need) for t, need in zip(given, asked, strict=True)
        )  # fmt: skip
        both = operators.add_rms_norm(x, r, w, 1e-6)
        taken = [i for i in range(2) if used in (("out", "total")[i], "both")]
        taken = [i for i in taken if both[i].requires_grad]
        if taken:
            torch.autograd.backward([both[i] for i in taken], [above[i].to(kind) for i in taken])
        results.append([t.grad for t in (x, r, w)])
    for found, wanted, need in zip(*results, asked, strict=True):
        if wanted is None:
            assert found is None
        else:
            assert need
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
