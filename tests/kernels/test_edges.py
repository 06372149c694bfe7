"""Every argument of every operator, of a wrong kind: one error that names operator and argument,
from the plain form and the fused one alike; and what is unusual and right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ovr_kernels import fused, reference
from ovr_kernels.objective import PolicyObjective

ROWS, WIDTH, VOCAB, HEADS, HEAD = 6, 16, 40, 3, 8
FORMS = {"reference": reference, "fused": fused}
ALL = PolicyObjective(importance_cap=2.0, kl_coef=0.1, entropy_coef=0.01)


@dataclass(frozen=True)
class Operator:
    """An operator's name, good arguments, and how it is called with them."""

    name: str
    arguments: Callable[[], dict[str, Any]]

    def __call__(self, form: ModuleType, **changed: Any) -> Any:
        arguments = self.arguments() | changed
        if "boundaries" in arguments:  # which is packed_gae's third argument, and a name here
            boundaries = arguments.pop("boundaries")
            named = {"cu_seqlens": arguments.pop("cu_seqlens", boundaries)}
            operands = [arguments.pop(name) for name in ("hidden", "weight", "targets")]
            return getattr(form, self.name)(*operands, **arguments, **named)
        positional = [arguments.pop(name) for name in list(arguments) if name in POSITIONAL]
        return getattr(form, self.name)(*positional, **arguments)


POSITIONAL = (
    "hidden", "weight", "targets", "objective", "logprobs", "policy_advantages", "policy", "values",
    "returns", "rewards", "critic", "cu_seqlens", "heads", "positions", "table", "residual",
    "norm_weight", "eps", "gate_up",
)  # fmt: skip


def number(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def head() -> dict[str, Any]:
    return {
        "hidden": number(ROWS, WIDTH), "weight": number(VOCAB, WIDTH),
        "targets": torch.arange(ROWS), "temperature": 1.0,
    }  # fmt: skip


def tokens() -> dict[str, Any]:
    return {
        "old_logprobs": -number(ROWS).abs(), "rollout_logprobs": -number(ROWS).abs(),
        "ref_logprobs": -number(ROWS).abs(), "weights": number(ROWS).abs(),
    }  # fmt: skip


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("linear_logprob", head),
        Operator(
            "linear_policy_loss",
            lambda: {
                **{k: v for k, v in head().items() if k != "temperature"}, "objective": ALL,
                "advantages": number(ROWS), "temperature": 1.0, **tokens(),
            },
        ),
        Operator("linear_cross_entropy", lambda: head() | {"weights": number(ROWS).abs()}),
        Operator(
            "linear_gspo_loss",
            lambda: head() | {
                "advantages": number(2), "boundaries": torch.tensor([0, 2, ROWS]),
                "old_logprobs": -number(ROWS).abs(),
            },
        ),
        Operator(
            "policy_loss",
            lambda: {
                "logprobs": -number(ROWS).abs(), "policy_advantages": number(ROWS), "policy": ALL,
                "entropies": number(ROWS).abs(), **tokens(),
            },
        ),
        Operator(
            "value_loss",
            lambda: {
                "values": number(ROWS), "returns": number(ROWS), "old_values": number(ROWS),
                "clip_eps": 0.2,
            },
        ),
        Operator(
            "packed_gae",
            lambda: {
                "rewards": number(ROWS), "critic": number(ROWS),
                "cu_seqlens": torch.tensor([0, 2, ROWS]), "gamma": 0.9, "gae_lambda": 0.9,
            },
        ),
        Operator(
            "rotate",
            lambda: {
                "heads": number(ROWS, HEADS, HEAD), "positions": torch.zeros(3, ROWS).long(),
                "table": reference.mrope_table(
                    base=1e4, head_dim=HEAD, sections=(1, 1, 2), device=torch.device("cpu")
                ),
                "rotary_heads": 2,
            },
        ),
        Operator(
            "rms_norm",
            lambda: {"hidden": number(ROWS, WIDTH), "norm_weight": number(WIDTH), "eps": 1e-6},
        ),
        Operator(
            "add_rms_norm",
            lambda: {
                "hidden": number(ROWS, WIDTH), "residual": number(ROWS, WIDTH),
                "norm_weight": number(WIDTH), "eps": 1e-6,
            },
        ),
        Operator("swiglu", lambda: {"gate_up": number(ROWS, 2 * WIDTH)}),
    )
}  # fmt: skip


def per_token(name: str) -> list[tuple[Any, str]]:
    """Faults of an argument that is one number a token."""
    return [
        (number(ROWS - 1), f"{name} is \\[5\\], not \\[6\\]: one a token"),
        (number(ROWS + 1), f"{name} is \\[7\\], not \\[6\\]"),
        (number(ROWS, 1), f"{name} is \\[6, 1\\], not \\[6\\]"),
        (number(1), f"{name} is \\[1\\], not \\[6\\]"),
        (number(ROWS).to(torch.complex64), f"{name} is torch.complex64"),
        (number(ROWS).to("meta"), f"{name} is on meta"),
    ]


def scalar(name: str) -> tuple[Any, str]:
    return torch.tensor(0.5), f"{name} is \\[\\], not \\[6\\]"


HEAD_FAULTS: dict[str, list[tuple[Any, str]]] = {
    "hidden": [
        (number(ROWS, WIDTH - 1), r"must be \[..., H\] and \[V, H\]"),
        (number(WIDTH), r"must be \[..., H\] and \[V, H\]"),
        (number(2, ROWS, WIDTH), r"targets \[6\] torch.int64 must be \[2, 6\] int64"),
        (torch.zeros(ROWS, WIDTH).long(), "hidden is torch.int64, not floating"),
        (number(ROWS, WIDTH).half(), "weight is torch.float32, hidden torch.float16"),
    ],
    "weight": [(number(0, WIDTH), "weight has no rows")],
    "bias": [
        (number(VOCAB - 1), r"bias \[39\] must be \[40\]"), (number(1), r"bias \[1\]"),
        (torch.tensor(0.5), r"bias \[\]"), (number(VOCAB).half(), "bias is torch.float16"),
        (number(VOCAB).to("meta"), "bias is on meta"),
    ],
    "softcap": [(0.0, "softcap=0.0 must be over 0"), (-3.0, "softcap"), (math.nan, "softcap=nan")],
    "targets": [
        (torch.arange(ROWS - 1), r"targets \[5\] torch.int64 must be \[6\] int64"),
        (torch.arange(ROWS)[:, None], r"targets \[6, 1\]"),
        (number(ROWS), "torch.float32 must be"),
    ],
    "temperature": [
        (0.0, "temperature=0.0 must be over 0"), (-1.0, "temperature=-1.0 must be over 0"),
        (math.nan, "temperature=nan"), (math.inf, "temperature=inf"),
    ],
}  # fmt: skip
FAULTS: dict[str, dict[str, list[tuple[Any, str]]]] = {
    "linear_logprob": HEAD_FAULTS,
    "linear_policy_loss": HEAD_FAULTS | {
        **{name: [*per_token(name), scalar(name)]
           for name in ("advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs")},
        "weights": [*per_token("weights"), (math.nan, "weights=nan is not finite")],
        "weight_gradient": [
            (torch.zeros(VOCAB, WIDTH - 1), r"must be \[40, 16\] float32"),
            (torch.zeros(VOCAB, WIDTH).half(), "float16 must be"),
            (torch.zeros(VOCAB, WIDTH), "weight_gradient needs a hidden that requires a gradient"),
        ],
    },
    "linear_cross_entropy": HEAD_FAULTS | {
        "weights": per_token("weights"),
        "reduction": [("average", "reduction='average' is not one of sum, mean, none")],
        "label_smoothing": [(-0.1, "label_smoothing=-0.1"), (1.1, "1.1"), (math.nan, "nan")],
        "z_loss": [(-0.1, "z_loss=-0.1"), (math.inf, "z_loss=inf")],
    },
    "linear_gspo_loss": HEAD_FAULTS | {
        "advantages": [
            (number(ROWS), r"advantages \[6\] must be \[2\]: one a response"),
            (number(2).to("meta"), "advantages are on meta"),
        ],
        "old_logprobs": per_token("old_logprobs"),
        "cu_seqlens": [
            (torch.tensor([0, 2]), r"cu_seqlens covers 0..2, not 0..6"),
            (torch.tensor([0, 7, ROWS]), "cu_seqlens descends"), (number(3), "integers"),
        ],
        "clip_low": [(-0.1, "clip_low=-0.1"), (math.nan, "clip_low=nan")],
        "clip_high": [(-0.1, "clip_high=-0.1"), (math.inf, "clip_high=inf")],
        "weights": [(number(3), r"weights is \[3\], not \[2\]"), (math.nan, "weights=nan")],
    },
    "policy_loss": {
        "policy_advantages": [(v, m) for v, m in per_token("advantages")],
        "entropies": per_token("entropies"), "old_logprobs": per_token("old_logprobs"),
        "rollout_logprobs": [*per_token("rollout_logprobs"), (None, "needs rollout_logprobs")],
        "ref_logprobs": [*per_token("ref_logprobs"), (None, "needs ref_logprobs")],
        "weights": per_token("weights"),
    },
    "value_loss": {
        "returns": per_token("returns"),
        "old_values": [*per_token("old_values"), (None, "clip_eps needs old_values")],
        "clip_eps": [(-0.1, "clip_eps=-0.1"), (math.nan, "clip_eps=nan")],
        "values": [(torch.zeros(ROWS).long(), "values is torch.int64")],
    },
    "packed_gae": {
        "critic": per_token("values"),
        "rewards": [(number(ROWS, 1), r"rewards \[6, 1\] must be \[R\]")],
        "cu_seqlens": [
            (torch.tensor([0, 2]), r"cu_seqlens covers 0..2, not 0..6"),
            (torch.tensor([1, ROWS]), r"covers 1..6"),
            (torch.tensor([0, 4, 2, ROWS]), "cu_seqlens descends"),
            (torch.tensor([0.0, 6.0]), "must be"), (torch.zeros(0).long(), "must be"),
        ],
        "gamma": [(-0.1, "gamma=-0.1"), (1.1, "gamma=1.1"), (math.nan, "gamma=nan")],
        "gae_lambda": [(1.1, "gae_lambda=1.1")],
    },
    "rotate": {
        "heads": [
            (number(ROWS, HEADS, HEAD - 1), "even D"), (number(ROWS, HEAD), r"must be \[T, N, D\]"),
            (number(ROWS, HEADS, HEAD * 2), "table is of 4 pairs, heads of 16 have 8"),
            (torch.zeros(ROWS, HEADS, HEAD).long(), "heads is torch.int64"),
        ],
        "positions": [
            (torch.zeros(3, ROWS - 1).long(), r"positions \[3, 5\] must be \[axes, 6\]"),
            (torch.zeros(ROWS).long(), r"positions \[6\]"), (number(3, ROWS), "not integers"),
        ],
        "rotary_heads": [(HEADS + 1, "rotary_heads=4 of 3 heads"), (-1, "rotary_heads=-1")],
    },
    "rms_norm": {
        "norm_weight": [
            (number(WIDTH - 1), r"weight \[15\] does not fit"), (number(WIDTH, 1), "does not fit"),
            (number(1), "does not fit"), (number(WIDTH).half(), "weight is torch.float16"),
            (number(WIDTH).to("meta"), "weight is on meta"),
        ],
        "eps": [(-1.0, "eps=-1.0"), (math.nan, "eps=nan")],
        "hidden": [(torch.zeros(ROWS, WIDTH).long(), "hidden is torch.int64")],
    },
    "add_rms_norm": {
        "residual": [
            (number(ROWS - 2, WIDTH), r"residual \[4, 16\] must be \[6, 16\]"),
            (number(WIDTH), r"residual \[16\]"), (number(1, WIDTH), r"residual \[1, 16\]"),
            (number(ROWS, WIDTH).half(), "residual is torch.float16"),
        ],
    },
    "swiglu": {
        "gate_up": [
            (number(ROWS, 7), "even last axis"), (number(ROWS, WIDTH).long(), "not floating"),
            (torch.tensor(1.0), "even last axis"),
        ],
    },
}  # fmt: skip
CASES = [
    (operator, argument, value, message)
    for operator, arguments in FAULTS.items()
    for argument, faults in arguments.items()
    for value, message in faults
]


def test_there_are_as_many_edges_as_there_should_be() -> None:
    assert len(CASES) >= 80
    assert set(FAULTS) == set(OPERATORS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("operator", "argument", "value", "message"),
    CASES,
    ids=[f"{case[0]}-{case[1]}-{number}" for number, case in enumerate(CASES)],
)
def test_a_wrong_argument_is_one_message(
    form: str, operator: str, argument: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OPERATORS[operator](FORMS[form], **{argument: value})
    alike = {"linear_gspo_loss": "gspo_loss"}
    assert alike.get(operator, operator) in str(caught.value) or "needs" in message


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["linear_logprob", "linear_policy_loss", "linear_cross_entropy", "linear_gspo_loss"]
)
def test_targets_outside_the_vocabulary_are_named(form: str, name: str) -> None:
    targets = torch.arange(ROWS)
    targets[2] = VOCAB
    with pytest.raises(RuntimeError, match=r"linear_\w+: a target is outside the vocabulary of 40"):
        OPERATORS[name](FORMS[form], targets=targets)
    targets[2] = -1
    OPERATORS[name](FORMS[form], targets=targets)
    OPERATORS[name](FORMS[form], targets=targets.int())


@pytest.mark.parametrize(
    "settings",
    [{"kl_coef": -1.0}, {"kl_coef": math.nan}, {"entropy_coef": math.nan}, {"clip_low": math.nan},
     {"clip_high": math.inf}, {"dual_clip": math.nan}, {"importance_cap": math.nan},
     {"clip_low": -0.1}, {"dual_clip": 0.5}, {"kind": "grpo"}],
)  # fmt: skip
def test_objectives_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(settings) + "|not one of"):
        PolicyObjective(**settings)


def both(name: str, **changed: Any) -> tuple[Any, Any]:
    return OPERATORS[name](reference, **changed), OPERATORS[name](fused, **changed)


def close(one: Any, other: Any) -> None:
    if isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            close(a, b)
    elif isinstance(one, Tensor):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.float16, torch.bfloat16, torch.bool]
)
def test_rewards_and_values_of_any_dtype_are_computed_in_fp32(dtype: torch.dtype) -> None:
    rewards = torch.tensor([0, 1, 0, 0, 0, 1]).to(dtype)
    found = both("packed_gae", rewards=rewards)
    close(*found)
    assert found[0][0].dtype is torch.float32
    close(found[1], OPERATORS["packed_gae"](fused, rewards=rewards.float()))
    if dtype.is_floating_point:
        large = torch.full((ROWS,), 300.0).to(dtype).requires_grad_()
        losses = both("value_loss", values=large, returns=-large.detach(), old_values=None,
                      clip_eps=None)  # fmt: skip
        close(*losses)
        assert losses[1].item() == ROWS * 180_000.0
        losses[1].backward()
        assert large.grad is not None
        assert large.grad.dtype is dtype


@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss"])
def test_a_weight_without_axes_is_every_tokens(name: str) -> None:
    scalar_, number_ = (both(name, weights=w) for w in (torch.tensor(0.5), 0.5))
    for a, b in zip(scalar_, number_, strict=True):
        torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(scalar_[0][0], scalar_[1][0])


@pytest.mark.parametrize("name", ["advantages", "old_logprobs", "weights"])
def test_half_precision_and_whole_numbers_a_token_are_right(name: str) -> None:
    name = "policy_advantages" if name == "advantages" else name
    value = torch.tensor([1, -1, 0, 2, -2, 1])
    for dtype in (torch.int64, torch.float16):
        one, other = both("policy_loss", **{name: value.to(dtype)})
        torch.testing.assert_close(one[0], other[0])
        assert one[0].dtype is torch.float32


def test_a_far_reference_is_limited_as_ratios_are() -> None:
    logprobs = torch.full((ROWS,), -120.0, requires_grad=True)
    losses, slopes = [], []
    for form in (reference, fused):
        logprobs.grad = None
        loss, _ = OPERATORS["policy_loss"](
            form, logprobs=logprobs, ref_logprobs=torch.full((ROWS,), -1.0)
        )
        loss.backward()
        assert torch.isfinite(loss)
        assert logprobs.grad is not None
        assert torch.isfinite(logprobs.grad).all()
        losses.append(loss.detach())
        slopes.append(logprobs.grad.clone())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [0, ROWS])
def test_without_gradients_the_buffer_is_left_alone(form: str, rows: int) -> None:
    buffer = torch.zeros(VOCAB, WIDTH)
    arguments = OPERATORS["linear_policy_loss"].arguments()
    per_row = {k: v[:rows] for k, v in arguments.items()
               if isinstance(v, Tensor) and v.shape[0] == ROWS}  # fmt: skip
    call = OPERATORS["linear_policy_loss"]
    with torch.no_grad():
        loss, statistics = call(FORMS[form], **per_row, weight_gradient=buffer)
    assert not buffer.any()
    assert not loss.requires_grad
    hidden = per_row["hidden"].clone().requires_grad_()
    again, found = call(FORMS[form], **{**per_row, "hidden": hidden}, weight_gradient=buffer)
    torch.testing.assert_close(loss, again.detach())
    torch.testing.assert_close(statistics.totals, found.totals)
    torch.testing.assert_close(statistics.logprobs, found.logprobs)
    if form == "reference" or not rows:
        again.backward()
    assert buffer.any() == bool(rows)


def test_an_evaluation_makes_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovr_kernels import in_forward

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(in_forward.OperandGradients, "add", never)
    monkeypatch.setattr(in_forward, "logit_gradients", never)
    for name in ("linear_policy_loss", "linear_cross_entropy", "linear_gspo_loss"):
        OPERATORS[name](fused)  # nothing asks for a gradient
        hidden = OPERATORS[name].arguments()["hidden"].requires_grad_()
        with torch.no_grad():
            OPERATORS[name](fused, hidden=hidden)


def test_the_upstream_factor_is_applied_in_fp32() -> None:
    """A third, rounded to bfloat16, is 0.2 % too large."""
    from ovr_kernels.head import scaled

    gradient = number(64, WIDTH).bfloat16()
    exact = gradient.double() / 3
    found = scaled(gradient, torch.tensor(1 / 3), torch.bfloat16).double()
    bias = float((found * exact).sum() / (exact * exact).sum()) - 1
    assert abs(bias) < 2e-4
    rounded = (gradient * torch.tensor(1 / 3).bfloat16()).double()
    assert abs(float((rounded * exact).sum() / (exact * exact).sum()) - 1) > 1e-3


@pytest.mark.parametrize(
    ("name", "argument"),
    [("linear_logprob", "hidden"), ("linear_policy_loss", "hidden"), ("policy_loss", "logprobs"),
     ("value_loss", "values"), ("rms_norm", "hidden"), ("swiglu", "gate_up")],
)  # fmt: skip
def test_a_second_derivative_is_refused(name: str, argument: str) -> None:
    leaf = OPERATORS[name].arguments()[argument].requires_grad_()
    out = OPERATORS[name](fused, **{argument: leaf})
    out = out[0] if isinstance(out, tuple) else out
    (gradient,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


LINEAR = ("linear_logprob", "linear_policy_loss", "linear_cross_entropy", "linear_gspo_loss")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LINEAR)
def test_autocast_casts_the_operands_as_a_linear_layers(form: str, name: str) -> None:
    """And nothing inside: a product in bfloat16 of a log-prob would be 1e-2 wrong."""
    arguments = OPERATORS[name].arguments()
    leaves = {key: arguments[key].clone().requires_grad_() for key in ("hidden", "weight")}
    with torch.autocast("cpu", dtype=torch.float16):
        found = OPERATORS[name](FORMS[form], **leaves)
    cast = {key: arguments[key].half().requires_grad_() for key in ("hidden", "weight")}
    wanted = OPERATORS[name](FORMS[form], **cast)
    found, wanted = (each[0] if isinstance(each, tuple) else each for each in (found, wanted))
    assert torch.equal(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.dtype is torch.float32
        torch.testing.assert_close(leaf.grad, cast[key].grad, check_dtype=False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LINEAR)
def test_either_operand_may_be_frozen(form: str, name: str) -> None:
    for wanted in ("hidden", "weight"):  # the other one is frozen
        leaf = OPERATORS[name].arguments()[wanted].requires_grad_()
        out = OPERATORS[name](FORMS[form], **{wanted: leaf})
        loss = out[0] if isinstance(out, tuple) else out
        loss.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.any()


def test_a_frozen_weight_costs_no_third_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovr_kernels import head as machine

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the weight's gradient was made")

    monkeypatch.setattr(machine, "add_product", never)
    for name in LINEAR:
        leaf = OPERATORS[name].arguments()["hidden"].requires_grad_()
        out = OPERATORS[name](fused, hidden=leaf)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        assert leaf.grad is not None


def test_rows_without_a_gradient_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovr_kernels import linear_logprob as module

    counts, real = [], module.row_statistics

    def count(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        counts.append(hidden.shape[0])
        return real(hidden, *arguments, **options)

    monkeypatch.setattr(module, "row_statistics", count)
    leaf = OPERATORS["linear_logprob"].arguments()["hidden"].requires_grad_()
    found = OPERATORS["linear_logprob"](fused, hidden=leaf)
    found[torch.tensor([1, 4])].sum().backward()
    assert counts == [ROWS, 2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_cross_entropy", "linear_gspo_loss"])
def test_a_buffer_under_activation_checkpointing_is_refused(form: str, name: str) -> None:
    buffer = torch.zeros(VOCAB, WIDTH)

    def run(hidden: Tensor) -> Tensor:
        return OPERATORS[name](FORMS[form], hidden=hidden, weight_gradient=buffer)[0]

    for reentrant in (True, False):
        leaf = OPERATORS[name].arguments()["hidden"].requires_grad_()
        loss = torch.utils.checkpoint.checkpoint(run, leaf, use_reentrant=reentrant)
        with pytest.raises(ValueError, match=f"{name}: with weight_gradient .* checkpointing"):
            loss.backward()
        without = torch.utils.checkpoint.checkpoint(
            lambda x: OPERATORS[name](FORMS[form], hidden=x)[0], leaf, use_reentrant=reentrant
        )
        without.backward()
        again = OPERATORS[name].arguments()["hidden"].requires_grad_()
        OPERATORS[name](FORMS[form], hidden=again)[0].backward()
        assert torch.equal(leaf.grad, again.grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LINEAR)
def test_transforms_of_functions_are_refused(form: str, name: str) -> None:
    def run(hidden: Tensor) -> Tensor:
        out = OPERATORS[name](FORMS[form], hidden=hidden)
        return (out[0] if isinstance(out, tuple) else out).sum()

    with pytest.raises(ValueError, match=rf"{name}: does not go with torch\.func"):
        torch.func.grad(run)(OPERATORS[name].arguments()["hidden"])


@pytest.mark.parametrize("form", FORMS)
def test_no_heads_to_rotate_and_no_tokens(form: str) -> None:
    heads = number(ROWS, HEADS, HEAD)
    torch.testing.assert_close(
        OPERATORS["rotate"](FORMS[form], heads=heads.clone(), rotary_heads=0), heads
    )
    empty = OPERATORS["rotate"](
        FORMS[form], heads=heads[:0].clone(), positions=torch.zeros(3, 0).long()
    )
    assert empty.shape == (0, HEADS, HEAD)


@pytest.mark.parametrize("upstream", [1.0, 65536.0])
@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_logprob"])
def test_fp16_gradients_of_small_coefficients_keep_their_digits(name: str, upstream: float) -> None:
    """1e-6 is one over the tokens of a batch, 65,536 the loss scale that fp16 is trained with."""
    arguments = head()
    hidden, weight = (arguments[key].half().requires_grad_() for key in ("hidden", "weight"))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    coefficients = torch.linspace(-1, 1, ROWS) * 1e-6
    logs = (exact[0] @ exact[1].t()).log_softmax(-1)[torch.arange(ROWS), arguments["targets"]]
    (-(logs * coefficients.double()).sum() * upstream).backward()
    if name == "linear_logprob":
        found = fused.linear_logprob(hidden, weight, arguments["targets"])
        (-(found * coefficients).sum() * upstream).backward()
    else:
        loss, _ = fused.linear_policy_loss(
            hidden, weight, arguments["targets"], PolicyObjective(kind="reinforce"),
            advantages=coefficients * 1e6, weights=1e-6,
        )  # fmt: skip
        (loss * upstream).backward()
    # Without a loss scale the gradients themselves are below what fp16 can hold.
    tolerance = 3e-3 if upstream > 1 else 0.1
    for got, wanted in zip((hidden, weight), exact, strict=True):
        assert got.grad is not None
        assert wanted.grad is not None
        error = (got.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert error <= tolerance, float(error)


def test_a_buffer_gets_fp16_gradients_at_full_precision() -> None:
    arguments = head()
    hidden, weight = arguments["hidden"].half(), arguments["weight"].half()
    advantages, buffer = number(ROWS), torch.zeros(VOCAB, WIDTH)
    exact = weight.double().requires_grad_()
    logs = (hidden.double() @ exact.t()).log_softmax(-1)[torch.arange(ROWS), arguments["targets"]]
    (-(logs * advantages.double()).sum() * 1e-6).backward()
    for _ in range(2):  # added, not written
        fused.linear_policy_loss(
            hidden.clone().requires_grad_(), weight, arguments["targets"],
            PolicyObjective(kind="reinforce"), advantages=advantages, weights=1e-6,
            weight_gradient=buffer,
        )  # fmt: skip
    assert exact.grad is not None
    error = (buffer.double() / 2 - exact.grad).norm() / exact.grad.norm()
    assert error <= 3e-3
