"""What users of other fused losses look for, against torch's own cross-entropy in float64.

The shapes and settings are those of the public suites of liger-kernel
(``test/transformers/test_fused_linear_cross_entropy.py``, ``test_cross_entropy.py``) and of
flash-attention (``tests/losses/test_cross_entropy.py``), where the feature exists here.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ovr_kernels import LinearCrossEntropyLoss, fuse_loss, fused, reference

FORMS = {"reference": reference, "fused": fused}
LIGER_SHAPES = [(2 * 47, 31, 123), (2 * 4, 64, 256)]  # rows, width, vocabulary
FLASH_SHAPES = [(16, 24, 1024), (5, 32, 4 * 512 + 3)]


def operands(rows: int, width: int, vocab: int, kind: torch.dtype, bias: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + width + vocab)
    shapes = [(rows, width), (vocab, width), *([(vocab,)] if bias else [])]
    scales = (1.0, 2.0 / width**0.5, 0.5)
    return [
        (torch.randn(*shape, generator=generator) * scale).to(kind).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=False)
    ]


def some_ignored(rows: int, vocab: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[torch.randperm(rows, generator=generator)[: rows // 3]] = index
    return targets


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, softcap: float | None,
    z_loss: float, ignore_index: int, reduction: str, label_smoothing: float,
) -> Tensor:  # fmt: skip
    """With torch's own operators, logits and all."""
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    counted = (targets != ignore_index) & (targets >= 0)
    ids = targets.where(counted, -100)
    losses = F.cross_entropy(logits, ids, reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * logits.logsumexp(-1).square().where(counted, 0.0)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted.sum()}[reduction]


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss.dtype)
    return list(torch.autograd.grad(loss, leaves, upstream))


def check(form: str, shape: tuple[int, int, int], kind: torch.dtype, chunk: int | None = None,
          **settings: Any) -> None:  # fmt: skip
    given = {"reduction": "mean", "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None,
             "ignore_index": -100} | settings  # fmt: skip
    bias = given.pop("bias", False)
    leaves = operands(*shape, kind, bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    targets = some_ignored(shape[0], shape[2], given["ignore_index"])
    wanted = plain(exact[0], exact[1], exact[2] if bias else None, targets, **given)
    loss, _ = FORMS[form].linear_cross_entropy(
        leaves[0], leaves[1], targets, bias=leaves[2] if bias else None,
        **({} if chunk is None else {"chunk": chunk}), **given,
    )  # fmt: skip
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-5, atol=2e-5)
    for found, right in zip(gradients(loss, leaves), gradients(wanted, exact), strict=True):
        error = float((found.double() - right).norm() / right.norm())
        assert error <= (3e-3 if kind is torch.float16 else 1e-5), error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("shape", LIGER_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("settings"),
    [{"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"z_loss": 1e-4},
     {"softcap": 30.0}, {"bias": True}, {"ignore_index": 2},
     {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 5.0, "bias": True, "ignore_index": 42}],
    ids=lambda settings: "-".join(settings),
)  # fmt: skip
def test_settings_of_liger(form: str, kind: torch.dtype, shape, settings: dict[str, Any]) -> None:
    check(form, shape, kind, **settings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", FLASH_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("smoothing", "scale", "z_loss"),
    list(itertools.product([0.0, 0.9], [1.0, 0.7], [0.0, 1.0])),
)
def test_settings_of_flash_attention(form: str, shape, smoothing, scale, z_loss) -> None:
    """Its ``logit_scale`` is the temperature's inverse, its ``lse_square_scale`` our z-loss."""
    hidden, weight = operands(*shape, torch.float32, bias=False)
    targets = some_ignored(shape[0], shape[2], -100)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    wanted = plain(
        exact[0] * scale, exact[1], None, targets, softcap=None, z_loss=z_loss,
        ignore_index=-100, reduction="none", label_smoothing=smoothing,
    )  # fmt: skip
    loss, _ = FORMS[form].linear_cross_entropy(
        hidden, weight, targets, reduction="none", label_smoothing=smoothing, z_loss=z_loss,
        temperature=1.0 / scale,
    )  # fmt: skip
    torch.testing.assert_close(loss.double(), wanted, rtol=3e-5, atol=3e-5)
    for found, right in zip(
        gradients(loss, [hidden, weight]), gradients(wanted, exact), strict=True
    ):
        assert (found.double() - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2, "softcap": 3.0, "bias": True}],
                         ids=["plain", "all"])  # fmt: skip
def test_chunks_change_nothing(form: str, settings: dict[str, Any]) -> None:
    for chunk in (7, 16, 94):
        check(form, LIGER_SHAPES[0], torch.float32, chunk=chunk, **settings)


@pytest.mark.parametrize("form", FORMS)
def test_all_ignored_counts_nothing(form: str) -> None:
    hidden, weight = operands(6, 16, 40, torch.float32, bias=False)
    for reduction in ("mean", "sum", "none"):
        loss, _ = FORMS[form].linear_cross_entropy(
            hidden, weight, torch.full((6,), 3), ignore_index=3, reduction=reduction, z_loss=0.1
        )
        assert not loss.detach().any()
        assert not any(g.any() for g in torch.autograd.grad(loss.sum(), [hidden, weight]))


@pytest.mark.parametrize("form", FORMS)
def test_leading_axes_stay(form: str) -> None:
    hidden, weight = operands(12, 16, 40, torch.float32, bias=False)
    targets = (torch.arange(12) * 7) % 40
    for shape in ((3, 4), (2, 3, 2)):
        wide, ids = hidden.view(*shape, 16), targets.view(shape).int()
        logprobs, entropies = FORMS[form].linear_logprob(wide, weight, ids, return_entropy=True)
        assert logprobs.shape == entropies.shape == shape
        flat = FORMS[form].linear_logprob(hidden, weight, targets)
        assert torch.equal(logprobs.flatten(), flat)
        losses, found = FORMS[form].linear_cross_entropy(wide, weight, ids, reduction="none")
        assert losses.shape == found.logprobs.shape == shape
        from ovr_kernels import PolicyObjective

        loss, found = FORMS[form].linear_policy_loss(
            wide, weight, ids, PolicyObjective(), advantages=torch.ones(shape)
        )
        assert found.logprobs.shape == found.entropies.shape == shape
        assert loss.shape == ()


@pytest.mark.parametrize("chunk", [4, 7, 100])
def test_gspo_in_the_forward_is_gspo_of_log_probs(chunk: int) -> None:
    """In chunks that cut responses, with clipped, empty and ignored ones, into a buffer."""
    hidden, weight = operands(20, 16, 40, torch.float32, bias=False)
    targets = (torch.arange(20) * 7) % 40
    targets[3] = -1
    ends = torch.tensor([0, 5, 5, 9, 20])
    known = reference.linear_logprob(hidden, weight, targets).detach()
    old = known + torch.tensor([2e-4] * 5 + [0.1] * 4 + [-0.1] * 11) * (targets >= 0)
    settings = {"advantages": torch.tensor([1.0, 5.0, -1.0, -2.0]), "cu_seqlens": ends,
                "old_logprobs": old, "weights": torch.tensor([0.5, 1.0, 0.25, 2.0])}  # fmt: skip
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    logs = (exact[0] @ exact[1].t()).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    logs = logs.where(targets >= 0, 0.0)
    wanted = torch.zeros((), dtype=torch.float64)
    for i, (a, b) in enumerate(itertools.pairwise(ends.tolist())):
        if a == b:
            continue
        ratio = ((logs[a:b] - old[a:b].double()).mean()).exp()
        near = ratio.clamp(1 - 3e-4, 1 + 4e-4)
        advantage = settings["advantages"][i].double()
        wanted = wanted - settings["weights"][i] * torch.minimum(
            ratio * advantage, near * advantage
        )
    right = torch.autograd.grad(wanted, exact)
    for form in FORMS.values():
        loss, found = form.linear_gspo_loss(hidden, weight, targets, chunk=chunk, **settings)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
        assert float(found.totals[2]) == 2.0
        for mine, exactly in zip(torch.autograd.grad(loss, [hidden, weight]), right, strict=True):
            assert (mine.double() - exactly).norm() <= 2e-5 * exactly.norm()
        buffer = torch.zeros_like(weight)
        loss, _ = form.linear_gspo_loss(
            hidden, weight.detach(), targets, chunk=chunk, weight_gradient=buffer, **settings
        )
        loss.backward()
        assert (buffer.double() - right[1]).norm() <= 2e-5 * right[1].norm()


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_the_module_is_the_function(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "triton":  # the interpreter runs it where selection wants a GPU
        monkeypatch.setattr("ovr_kernels.modules.operators_for", lambda device, choice: fused)
    loss_of = LinearCrossEntropyLoss(label_smoothing=0.1, z_loss=1e-3, softcap=20.0)
    hidden, weight, bias = operands(12, 16, 40, torch.float32, bias=True)
    targets = (torch.arange(12) * 7) % 40
    found = loss_of(hidden.view(3, 4, 16), weight, targets.view(3, 4), bias)
    wanted = plain(hidden, weight, bias, targets, softcap=20.0, z_loss=1e-3, ignore_index=-100,
                   reduction="mean", label_smoothing=0.1)  # fmt: skip
    torch.testing.assert_close(found, wanted)
    assert "label_smoothing=0.1" in repr(loss_of)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["logprob", "cross_entropy", "policy"])
def test_compiled_in_one_graph(form: str, name: str) -> None:
    from ovr_kernels import PolicyObjective

    operators = FORMS[form]
    hidden, weight = operands(12, 16, 40, torch.float32, bias=False)
    targets, advantages = (torch.arange(12) * 7) % 40, torch.linspace(-1, 1, 12)
    targets[2] = -1

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        if name == "logprob":
            logprobs, entropies = operators.linear_logprob(
                hidden * 2.0, weight, targets, return_entropy=True
            )
            return (logprobs + 0.1 * entropies).sum()
        if name == "cross_entropy":
            return operators.linear_cross_entropy(
                hidden * 2.0, weight, targets, reduction="mean", label_smoothing=0.1, z_loss=0.01
            )[0]
        return operators.linear_policy_loss(
            hidden * 2.0, weight, targets, PolicyObjective(entropy_coef=0.1), advantages=advantages
        )[0]

    wanted = run(hidden, weight)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(found, wanted)
    for mine, right in zip(
        torch.autograd.grad(found, [hidden, weight]), torch.autograd.grad(wanted, [hidden, weight]),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("form", FORMS)
def test_elementwise_operators_compile_in_one_graph(form: str) -> None:
    operators = FORMS[form]
    hidden, scale = torch.randn(6, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def run(hidden: Tensor, scale: Tensor) -> Tensor:
        normal, total = operators.add_rms_norm(hidden, hidden * 0.5, scale, 1e-6)
        gated = operators.swiglu(operators.rms_norm(normal + total, scale, 1e-6))
        values = gated.sum(-1)
        return operators.value_loss(values, values.detach() + 1.0)

    wanted = run(hidden, scale)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, scale)
    torch.testing.assert_close(found, wanted)
    for mine, right in zip(
        torch.autograd.grad(found, [hidden, scale]), torch.autograd.grad(wanted, [hidden, scale]),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
def test_a_model_of_transformers_has_the_same_loss(
    form: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr("ovr_kernels.modules.operators_for", lambda device, choice: FORMS[form])
    torch.manual_seed(0)
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    if family == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text))
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        config = transformers.Qwen2_5_VLConfig(
            text_config=text | {"rope_scaling": rope, "rope_parameters": rope},
            vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                           "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        )  # fmt: skip
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.float()
    ids = torch.randint(3, 90, (2, 9))
    labels = ids.clone()
    labels[:, :3] = -100

    def result(**options: Any) -> tuple[Any, list[Tensor]]:
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, **options)
        out.loss.backward()
        return out, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain_out, wanted = result()
    counted, _ = result(num_items_in_batch=torch.tensor(5))
    logits = model(input_ids=ids).logits
    assert fuse_loss(model) is model
    assert fuse_loss(model) is model  # once is enough
    out, found = result()
    assert out.logits is None
    assert set(out.keys()) == set(plain_out.keys()) - {"logits"}
    assert len(model(input_ids=ids, labels=labels, return_dict=False)) == len(out.to_tuple())
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert float(twin(input_ids=ids, labels=labels).loss) == pytest.approx(math.log(96))
    pickle.dumps(model)
    torch.testing.assert_close(out.loss, plain_out.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        result(num_items_in_batch=torch.tensor(5))[0].loss, counted.loss, rtol=1e-5, atol=1e-5
    )
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(input_ids=ids).logits, logits)
    with pytest.raises(ValueError, match="no linear lm_head"):
        fuse_loss(torch.nn.Linear(2, 2))


def test_a_model_that_changes_its_logits_is_refused() -> None:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=2.0,
    )  # fmt: skip
    model = fuse_loss(transformers.Gemma2ForCausalLM(config))
    ids = torch.arange(6)[None]
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes its logits between"):
        model(input_ids=ids, labels=ids)
    assert model(input_ids=ids).logits.shape == (1, 6, 32)  # the head is itself again
    model = transformers.Gemma2ForCausalLM(config)
    model.loss_function = lambda **given: 0.0
    with pytest.raises(ValueError, match="is not transformers' ForCausalLMLoss"):
        fuse_loss(model)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    ))  # fmt: skip
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(ValueError, match="was replaced; fuse its loss before"):
        fuse_loss(model)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_a_number_stays_so(form: str) -> None:
    hidden, weight = (t.detach() for t in operands(6, 16, 40, torch.float32, bias=False))
    hidden[2] = torch.nan
    found = FORMS[form].linear_logprob(hidden, weight, torch.arange(6))
    assert found.isnan().tolist() == [False, False, True, False, False, False]
    loss, _ = FORMS[form].linear_cross_entropy(hidden, weight, torch.arange(6))
    assert loss.isnan()


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "in blocks"])
@pytest.mark.parametrize("form", FORMS)
def test_banned_words_have_a_bias_of_minus_infinity(
    form: str, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain form in blocks of 32 words too, most of them banned."""
    if blocks:
        monkeypatch.setattr(reference, "CHUNK_LOGITS", 128)
        monkeypatch.setattr(reference, "CHUNK_ROWS", 4)
    hidden, weight = (t.detach() for t in operands(6, 16, 600, torch.float32, bias=False))
    bias = torch.zeros(600)
    bias[:300] = -torch.inf
    targets = torch.arange(6) + 400
    found, entropies = FORMS[form].linear_logprob(
        hidden, weight, targets, bias=bias, return_entropy=True
    )
    logs = (hidden @ weight.t() + bias).double().log_softmax(-1)
    wanted = logs.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    logs = logs[:, 300:]
    torch.testing.assert_close(
        entropies.double(), -(logs.exp() * logs).sum(-1), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("cap", [3.0, 50.0, 1e3, 1e5])
def test_a_cap_of_any_size_keeps_its_digits(cap: float) -> None:
    hidden, weight = operands(6, 16, 600, torch.float32, bias=False)
    targets = torch.arange(6)
    found = fused.linear_logprob(hidden, weight, targets, softcap=cap)
    logits = hidden.double() @ weight.double().t()
    wanted = (cap * torch.tanh(logits / cap)).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_softcap_whose_probabilities_vanish_does_not_go_with_smoothing() -> None:
    hidden, weight = operands(6, 16, 600, torch.float32, bias=False)
    with pytest.raises(ValueError, match=r"softcap=50.0 with label_smoothing leaves .* e\^-106"):
        fused.linear_cross_entropy(
            hidden, weight, torch.arange(6), softcap=50.0, label_smoothing=0.1
        )
    with pytest.raises(ValueError, match=r"softcap=30.0 with label_smoothing .* torch.float16"):
        fused.linear_cross_entropy(
            hidden.half(), weight.half(), torch.arange(6), softcap=30.0, label_smoothing=0.1
        )


def test_a_compiled_call_makes_no_gradient_of_a_frozen_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ovr_kernels import linear_logprob

    asked, real = [], linear_logprob.rows_backward

    def spy(*arguments: Any, wanted: Any) -> Any:
        asked.append(wanted)
        return real(*arguments, wanted=wanted)

    monkeypatch.setattr(linear_logprob, "rows_backward", spy)
    hidden, weight = operands(6, 16, 40, torch.float32, bias=False)
    weight = weight.detach()

    def run(hidden: Tensor) -> Any:
        return fused.linear_logprob(hidden, weight, torch.arange(6)).sum()

    torch.compile(run, fullgraph=True, backend="aot_eager")(hidden).backward()
    assert asked == [(True, False, False)]
    assert hidden.grad is not None
    assert hidden.grad.any()
