"""What a server of the published models holds on each of its workers, against numbers by hand."""

from __future__ import annotations

import pytest
import torch

from ovr_fast.model.hf_weights import parameter_table
from ovr_fast.rollout.engine_weights import Expected, form
from ovr_fast.shape.folder import PUBLISHED
from ovr_fast.shape.model_shape import ModelShape, read_shape

LAYER = "language_model.model.layers.0"
CASES = {
    # name, workers: rows of queries, keys and values; of the vocabulary; the MLP's width
    ("3B", 1): (2560, 151_936, 11_008),
    ("3B", 2): (1280, 75_968, 5504),
    ("3B", 4): (768, 37_984, 2752),  # its 2 heads of keys are on two workers each
    ("7B", 4): (1152, 38_016, 4736),
    ("72B", 8): (1280, 19_008, 3696),
}


def expected_of(shape: ModelShape, workers: int) -> Expected:
    expected = Expected(workers=workers, shape=shape, measure=form)
    for row in parameter_table(shape, 1, value_head=False):
        for part in row.tensors:
            expected.add(part.name, torch.empty(part.shape, dtype=torch.bfloat16, device="meta"))
    return expected


def manifest_of(expected: Expected) -> dict[str, str]:
    """A server's that holds exactly this."""
    return {f"dp0:pp0:pcp0:tp{rank}:{name}": v for (rank, name), v in expected._found.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} on {case[1]}")
def test_weights_are_cut_over_the_workers_as_vllm_cuts_them(case: tuple[str, int]) -> None:
    name, workers = case
    shape = read_shape(PUBLISHED / f"Qwen2.5-VL-{name}-Instruct")
    qkv, vocabulary, width = CASES[case]
    expected = expected_of(shape, workers)
    for rank in range(workers):
        for engine, size in {
            f"{LAYER}.self_attn.qkv_proj.weight": [qkv, shape.hidden],
            f"{LAYER}.self_attn.qkv_proj.bias": [qkv],
            f"{LAYER}.self_attn.o_proj.weight": [
                shape.hidden, shape.heads * shape.head_dim // workers,
            ],
            f"{LAYER}.mlp.gate_up_proj.weight": [2 * width, shape.hidden],
            f"{LAYER}.mlp.down_proj.weight": [shape.hidden, width],
            f"{LAYER}.input_layernorm.weight": [shape.hidden],
            "language_model.model.embed_tokens.weight": [vocabulary, shape.hidden],
        }.items():  # fmt: skip
            assert expected._found[rank, engine] == f"bfloat16 {size}", engine
        head = expected._found.get((rank, "language_model.lm_head.weight"))
        tied = shape.tied_embeddings
        assert head == (None if tied else f"bfloat16 {[vocabulary, shape.hidden]}")
    assert expected.misfits(manifest_of(expected)) == []


def test_replicated_heads_of_keys_are_the_same_on_their_workers() -> None:
    shape = read_shape(PUBLISHED / "Qwen2.5-VL-3B-Instruct")
    expected = Expected(workers=4, shape=shape)
    keys = torch.arange(2.0).repeat_interleave(shape.head_dim)
    pieces = [expected._piece(keys, "model.layers.0.self_attn.k_proj.bias", r) for r in range(4)]
    assert [piece.unique().tolist() for piece in pieces] == [[0.0], [0.0], [1.0], [1.0]]


def test_what_does_not_fit_is_named() -> None:
    expected = expected_of(read_shape(PUBLISHED / "Qwen2.5-VL-7B-Instruct"), 1)
    manifest, norm = manifest_of(expected), f"dp0:pp0:pcp0:tp0:{LAYER}.input_layernorm.weight"
    manifest[norm] = "float32 [3584]"
    del manifest["dp0:pp0:pcp0:tp0:language_model.lm_head.weight"]
    manifest["dp0:pp0:pcp0:tp0:more"] = "float32 [1]"
    assert expected.misfits(manifest) == [
        "language_model.lm_head.weight is missing there and bfloat16 [152064, 3584] here",
        f"{LAYER}.input_layernorm.weight is float32 [3584] there and bfloat16 [3584] here",
        "more is float32 [1] there and missing here",
    ]


def test_what_a_server_may_lack_or_have_twice() -> None:
    """The vision tower, where prompts have no images; the output embedding in mid-update, where it
    is the input's."""
    expected = expected_of(read_shape(PUBLISHED / "Qwen2.5-VL-3B-Instruct"), 1)
    manifest = {k: v for k, v in manifest_of(expected).items() if ":visual." not in k}
    manifest["dp0:pp0:pcp0:tp0:language_model.lm_head.weight"] = "bfloat16 [151936, 2048]"
    assert expected.misfits(manifest) == []
    manifest["dp0:pp0:pcp0:tp0:visual.merger.ln_q.weight"] = "bfloat16 [1280]"
    assert len(expected.misfits(manifest)) > 100
