"""The mathematics: numbers worked by hand, finite differences, and properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr_kernels import reference as kernels


def test_gae_by_hand() -> None:
    # One response of three tokens, reward 1 at the end, gamma = 0.5, lambda = 0.5:
    # deltas are 0.5*0.4 - 0.2 = 0, 0.5*0.6 - 0.4 = -0.1, 1 - 0.6 = 0.4;
    # advantages are 0.4, -0.1 + 0.25*0.4 = 0, 0 + 0.25*0 = 0.
    advantages, returns = kernels.packed_gae(
        torch.tensor([0.0, 0.0, 1.0]),
        torch.tensor([0.2, 0.4, 0.6]),
        torch.tensor([0, 3]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    torch.testing.assert_close(advantages, torch.tensor([0.0, 0.0, 0.4]))
    torch.testing.assert_close(returns, torch.tensor([0.2, 0.4, 1.0]))


def test_gae_with_gamma_and_lambda_one_is_reward_minus_value() -> None:
    values = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8])
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    ends = torch.tensor([0, 3, 5])
    advantages, returns = kernels.packed_gae(rewards, values, ends, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(returns, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(advantages, returns - values)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    gamma=st.floats(0.5, 1.0),
    gae_lambda=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_gae_of_packed_responses_is_that_of_each_alone(lengths, gamma, gae_lambda, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    rewards = torch.randn(total, generator=generator)
    values = torch.randn(total, generator=generator)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    dials = dict(gamma=gamma, gae_lambda=gae_lambda)
    packed, _ = kernels.packed_gae(rewards, values, ends, **dials)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone, _ = kernels.packed_gae(
            rewards[start:end], values[start:end], torch.tensor([0, end - start]), **dials
        )
        torch.testing.assert_close(packed[start:end], alone)


def test_gae_refuses_boundaries_that_do_not_cover_its_tokens() -> None:
    with pytest.raises(ValueError, match="not 0..3"):
        kernels.packed_gae(
            torch.zeros(3), torch.zeros(3), torch.tensor([0, 2]), gamma=1.0, gae_lambda=1.0
        )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_linear_logprob_agrees_with_log_softmax(temperature: float, chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(33, 8).requires_grad_()
    targets = torch.randint(33, (10,))
    logprob, entropy = kernels.linear_logprob(
        hidden, weight, targets, temperature=temperature, chunk=chunk
    )
    full = (hidden.double() @ weight.double().t() / temperature).log_softmax(-1)
    expected = full.gather(1, targets[:, None])[:, 0]
    expected_entropy = -(full.exp() * full).sum(-1)
    torch.testing.assert_close(logprob.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)
    mix = torch.randn(10)
    found = torch.autograd.grad((logprob * mix + 0.3 * entropy * mix).sum(), [hidden, weight])
    loss = (expected * mix.double() + 0.3 * expected_entropy * mix.double()).sum()
    for a, b in zip(found, torch.autograd.grad(loss, [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


def test_linear_logprob_survives_peaked_and_very_negative_rows() -> None:
    weight = torch.eye(4) * 40
    hidden = torch.tensor([[1.0, 0, 0, 0], [-250.0, -250, -250, -250]])
    logprob, entropy = kernels.linear_logprob(hidden, weight, torch.tensor([0, 1]))
    assert torch.isfinite(logprob).all()
    assert torch.isfinite(entropy).all()
    assert (logprob <= 0).all()
    torch.testing.assert_close(logprob[1], -torch.tensor(4.0).log())


def test_policy_loss_by_hand_and_its_gradient() -> None:
    old = torch.zeros(4)
    new = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5])).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, ratio = kernels.policy_loss(new, advantages, old_logprobs_R=old, clip_eps=0.2)
    # min(r A, clip(r) A): 1.2, 0.5, -1.5, -0.8
    torch.testing.assert_close(loss, torch.tensor([-1.2, -0.5, 1.5, 0.8]))
    torch.testing.assert_close(ratio, torch.tensor([1.5, 0.5, 1.5, 0.5]))
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.5, 1.5, 0.0]))


def test_on_policy_loss_has_the_gradient_of_the_slow_path() -> None:
    new = torch.randn(6).requires_grad_()
    advantages = torch.randn(6)
    fast, ratio = kernels.policy_loss(new, advantages, old_logprobs_R=None, clip_eps=0.2)
    slow, _ = kernels.policy_loss(
        new, advantages, old_logprobs_R=new.detach().clone(), clip_eps=0.2
    )
    assert torch.equal(ratio, torch.ones(6))
    assert torch.equal(
        torch.autograd.grad(fast.sum(), new)[0], torch.autograd.grad(slow.sum(), new)[0]
    )


def test_value_loss_by_hand() -> None:
    values, returns = torch.tensor([0.5, 0.9]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(kernels.value_loss(values, returns), torch.tensor([0.125, 0.405]))
    # Clipped to old +- 0.2: 0.2 and 0.8; the larger error counts.
    clipped = kernels.value_loss(
        values, returns, old_values_R=torch.tensor([0.0, 0.6]), clip_eps=0.2
    )
    torch.testing.assert_close(clipped, torch.tensor([0.5 * 0.64, 0.5 * 0.81]))


def test_kl_is_never_negative_and_zero_at_equality() -> None:
    a, b = torch.randn(100), torch.randn(100)
    assert (kernels.kl_k3(a, b) >= 0).all()
    assert torch.equal(kernels.kl_k3(a, a), torch.zeros(100))


def test_text_positions_make_mrope_the_usual_rotation() -> None:
    positions = torch.arange(5).repeat(3, 1)
    cos, sin = kernels.mrope_tables(positions, base=100.0, head_dim=8, sections=(1, 1, 2))
    angles = torch.arange(5)[:, None] * (100.0 ** (-torch.arange(0, 8, 2) / 8))[None]
    torch.testing.assert_close(cos, angles.cos())
    heads = torch.randn(5, 2, 8)
    turned = kernels.rotate(heads, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    back = kernels.rotate(turned, cos, -sin)
    torch.testing.assert_close(back, heads)
