"""Packing, positions and the cutting of a rollout batch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr_fast.data.balance import (
    greedy_partition,
    load_imbalance,
    pipeline_order,
    pipeline_time,
    rebalance,
    split_minibatches,
)
from ovr_fast.data.packing import assign_bins, assign_groups, pack
from ovr_fast.data.positions import MRopeCache, mrope_positions
from ovr_fast.data.rollouts import LENGTH_SIGMA
from ovr_fast.recipe.shards import in_pipeline_order
from ovr_fast.records import Microbatch, Minibatch, Segments, Sequence

IMAGE = 7


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), room=st.integers(50, 90))
def test_bins_hold_every_sequence_once_and_never_overflow(lengths, room) -> None:
    bins = assign_bins(lengths, room)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= room for b in bins)
    # Best fit: no two bins could be one.
    sizes = sorted(sum(lengths[i] for i in b) for b in bins)
    assert len(bins) == 1 or sizes[0] + sizes[1] > room


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    room=st.integers(50, 90),
    groups=st.integers(1, 8),
)
def test_groups_fit_their_bins(lengths, room, groups) -> None:
    of = [i % groups for i in range(len(lengths))]
    bins = assign_groups(lengths, of, room)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= room for b in bins)


def test_groups_stay_together_as_far_as_there_is_room() -> None:
    sizes, of = [10, 11, 12, 13] * 4, [place // 4 for place in range(16)]
    assert sorted(assign_groups(sizes, of, 46)) == [list(range(g, g + 4)) for g in (0, 4, 8, 12)]
    halves = assign_groups([10] * 16, of, 20)  # a bin holds two: of one group each
    assert all(len({of[i] for i in chosen}) == 1 for chosen in halves)
    # Four of a prompt's responses in a minibatch, whatever the cap leaves room for.
    rng = np.random.default_rng(0)
    for cap, mean in [(24_576, 2000), (24_576, 9500), (53_248, 2000), (53_248, 9500)]:
        drawn = rng.lognormal(np.log(mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA, 512)
        sizes = [1500 + int(n) for n in drawn.clip(1, cap - 1500)]
        of = sorted(int(group) for group in rng.integers(0, 128, 512))
        apart, grouped = assign_bins(sizes, cap), assign_groups(sizes, of, cap)
        assert len(grouped) <= 1.09 * len(apart)
        prompts = [sum(len({of[i] for i in chosen}) for chosen in b) for b in (grouped, apart)]
        assert prompts[0] < 0.6 * prompts[1]  # that are left to compute


def test_a_sequence_over_the_cap_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, over the 8"):
        assign_bins([3, 9], 8)
    with pytest.raises(ValueError, match="sequence 2 has 9 tokens, over the 8"):
        assign_groups([3, 4, 9], [0, 0, 1], 8)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(8, 80), ranks=st.integers(1, 4), units=st.integers(1, 2), seed=st.integers(0)
)
def test_units_do_not_depend_on_the_number_of_ranks(count, ranks, units, seed) -> None:
    lengths = list(range(1, count + 1))
    alone = list(range(len(lengths)))
    many = split_minibatches(lengths, alone, count=units, ranks=ranks, seed=(0, seed))
    one = split_minibatches(lengths, alone, count=units, ranks=1, seed=(0, seed))
    for shares, whole in zip(many, one, strict=True):
        assert all(shares)
        assert sorted(i for share in shares for i in share) == whole[0]
    assert sorted(i for unit in one for i in unit[0]) == list(range(count))


@settings(max_examples=50, deadline=None)
@given(
    costs=st.lists(st.integers(1, 9).map(float), min_size=1, max_size=12),
    stages=st.integers(1, 4),
)
def test_a_pipeline_is_no_slower_in_the_order_that_is_chosen(costs, stages) -> None:
    order = pipeline_order(costs, stages)
    assert sorted(order) == list(range(len(costs)))
    times = [pipeline_time([costs[i] for i in o], stages) for o in (order, range(len(costs)))]
    assert times[0] <= times[1]
    # No stage works less than all microbatches, and a pipeline is done when one has gone through.
    assert times[0] >= max(3 * sum(costs), 3 * stages * max(costs))
    assert pipeline_time(costs, 1) == 3 * sum(costs)


@pytest.mark.parametrize(("stages", "count"), [(2, 1), (2, 8), (4, 8), (4, 2), (8, 32)])
def test_a_pipeline_of_equal_microbatches_has_the_known_bubble(stages: int, count: int) -> None:
    """(stages - 1) microbatches (Narayanan et al. 2021, section 2.2)."""
    assert pipeline_time([2.0] * count, stages) == 3 * 2.0 * (count + stages - 1)


def test_an_update_is_in_the_order_of_its_pipeline() -> None:
    """Targets with their microbatches; one stage leaves them as they are."""
    costs = [3.0, 1.0, 2.0, 5.0]
    batches = tuple(SimpleNamespace(cost=cost) for cost in costs)
    joined = Minibatch(microbatches=batches, targets=tuple(costs), global_tokens=1)
    for stages in (1, 2, 4):
        found = in_pipeline_order(joined, SimpleNamespace(pp=stages))
        order = pipeline_order(costs, stages) if stages > 1 else range(4)
        assert [batch.cost for batch in found.microbatches] == [costs[i] for i in order]
        assert list(found.targets) == [costs[i] for i in order]
    assert [batch.cost for batch in found.microbatches] != costs


@pytest.mark.parametrize(("stages", "as_packed", "chosen"), [(2, 0.20, 0.07), (4, 0.46, 0.19)])
def test_what_the_order_of_microbatches_is_worth(
    stages: int, as_packed: float, chosen: float
) -> None:
    rng, waits = np.random.default_rng(0), []
    for _ in range(20):
        costs = rng.lognormal(0.0, 0.3, 16).tolist()
        orders = range(16), pipeline_order(costs, stages)
        times = [pipeline_time([costs[i] for i in order], stages) for order in orders]
        waits.append([time / (3 * sum(costs)) - 1 for time in times])
    assert np.mean(waits, axis=0) == pytest.approx([as_packed, chosen], abs=0.02)


def test_too_few_rollouts_for_the_ranks_is_said() -> None:
    with pytest.raises(ValueError, match="raise rl.prompts_per_step"):
        split_minibatches([1, 2, 3], [0, 1, 2], count=2, ranks=2, seed=(0, 0))


def recipe_lengths(count: int, seed: int = 0) -> list[int]:
    """Responses of 10 thousand tokens on average, cut at 24k, after prompts of 600."""
    rng = np.random.default_rng(seed)
    drawn = rng.lognormal(np.log(10_000) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA, count)
    return (np.minimum(drawn, 24_576).astype(int) + 600).tolist()


@pytest.mark.parametrize("cap", [32_768, 53_248])
def test_microbatches_of_the_recipe_are_full(cap: int) -> None:
    """A rank's share of a critic minibatch: at most 1 % of the cap stays empty, but for what the
    last microbatch cannot have."""
    lengths = recipe_lengths(8192 // 4 // 8)
    bins = assign_bins(lengths, cap)
    assert len(bins) <= -(-sum(lengths) // cap) + 1
    assert sum(lengths) / (len(bins) - 1) / cap >= 0.99


def test_microbatches_are_of_like_cost_where_there_is_room() -> None:
    lengths = [10, 10, 10, 10, 40, 40]
    costs = [float(length**2) for length in lengths]
    bins = assign_bins(lengths, 65, costs)
    assert sorted(sum(costs[i] for i in b) for b in bins) == [1800.0, 1800.0]


def test_ranks_get_like_costs_and_keep_prompts_together() -> None:
    lengths = recipe_lengths(8192)
    prompts = [index // 16 for index in range(8192)]
    costs = [length * 1e6 + length**2 * 14.0 for length in lengths]
    alone = list(range(8192))
    units = split_minibatches(costs, alone, count=4, ranks=8, seed=(0, 0), affinity=prompts)
    assert max(load_imbalance(unit, costs) for unit in units) <= 0.01
    places = {(prompts[i], rank) for unit in units for rank, s in enumerate(unit) for i in s}
    # Without affinity nearly every prompt would be encoded on all 8 replicas: 4,096 places.
    assert len(places) < 2 * 512


def test_rebalancing_fills_an_empty_share() -> None:
    shares: list[list[int]] = [[0, 1, 2, 3], []]
    rebalance(shares, [4.0, 3.0, 2.0, 1.0])
    assert sorted(sum([4.0, 3.0, 2.0, 1.0][i] for i in share) for share in shares) == [5.0, 5.0]
    assert greedy_partition([5.0], 4) == [[0], [], [], []]
    shares = [[0], [1, 2], []]  # the largest load is one item, so the empty share gets of the other
    rebalance(shares, [10.0, 1.0, 1.0])
    assert sorted(map(len, shares)) == [1, 1, 1]


def test_samples_of_a_group_stay_in_one_unit() -> None:
    groups = [index // 4 for index in range(24)]
    units = split_minibatches(list(range(1, 25)), groups, count=3, ranks=2, seed=(0, 1))
    held = [{groups[i] for share in unit for i in share} for unit in units]
    assert sorted(group for unit in held for group in unit) == list(range(6))


def test_a_rank_without_rollouts_is_said() -> None:
    groups = [index // 3 for index in range(18)]
    with pytest.raises(ValueError, match="leaves one of 4 data-parallel ranks without any"):
        split_minibatches([1] * 18, groups, count=4, ranks=4, seed=(0, 0))


class NoImages:
    merge_size = 2

    def grid(self, image):
        raise AssertionError("a text-only batch has no images")


def test_rows_point_at_the_token_before_each_response_token() -> None:
    sequences = [
        Sequence.unsampled(np.array([10, 11, 12, 13]), response_start=2, images=(), name="a"),
        Sequence.unsampled(np.array([20, 21, 22, 23]), response_start=1, images=(), name="b"),
    ]
    sequences[1] = replace(sequences[1], rollout_logprobs=np.array([-1, -2, -3.0]), reward=1.0)
    positions = MRopeCache(NoImages(), IMAGE)  # type: ignore[arg-type]
    (batch,) = pack(sequences, positions=positions, max_tokens=9, multiple=5)
    assert batch.sequence_ids == (0, 1)
    assert batch.tokens_T.tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 10, 10]
    assert batch.tokens_T[batch.predictor_index_R].tolist() == [11, 12, 20, 21, 22]
    assert batch.labels_R.tolist() == [12, 13, 21, 22, 23]
    # Two dummy tokens are a segment of their own, and no response.
    assert batch.segments.lengths == (4, 4, 2)
    assert batch.segments.max_seqlen == 4
    assert batch.segments.cu_seqlens_S1.tolist() == [0, 4, 8, 10]
    assert batch.responses.lengths == (2, 3)
    # What was sampled comes along; what was not would stop a loss that read it.
    assert batch.rollout_logprobs_R[2:].tolist() == [-1, -2, -3]
    assert batch.rollout_logprobs_R[:2].isnan().all()
    assert np.isnan(batch.rewards_S[0])
    assert batch.rewards_S[1] == 1.0
    assert batch.positions_3T[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0]
    assert batch.images == ()


def test_segments_that_do_not_cover_the_tokens_are_refused() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    whole = dict(
        tokens_T=torch.zeros(4, dtype=torch.int64),
        positions_3T=torch.zeros(3, 4, dtype=torch.int64),
        segments=Segments.of([4]),
        predictor_index_R=empty,
        labels_R=empty,
        responses=Segments.of([]),
        rollout_logprobs_R=empty.float(),
        rewards_S=(),
        advantages_S=(),
        sequence_ids=(),
        cost=0.0,
        images=(),
        visual_index_G=empty,
    )
    Microbatch(**whole)
    with pytest.raises(ValueError, match="segments cover 3 tokens, but the microbatch has 4"):
        Microbatch(**whole | {"segments": Segments.of([3])})
    with pytest.raises(ValueError, match="responses cover 2 tokens, but there are 0 labels"):
        Microbatch(**whole | {"responses": Segments.of([2])})


def test_positions_by_hand() -> None:
    # Two text tokens, an image of 2 x 3 visual tokens, one text token.
    tokens = np.array([1, 2, *[IMAGE] * 6, 3])
    positions = mrope_positions(tokens, [(1, 4, 6)], image_token_id=IMAGE, merge_size=2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


@settings(max_examples=200, deadline=None)
@given(
    layout=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20)), max_size=4
    ),
    tail=st.integers(1, 5),
)
def test_positions_agree_exactly_with_transformers(layout, tail) -> None:
    model = _rope_index_owner()
    tokens: list[int] = []
    grids = []
    for text, h, w in layout:
        tokens += [1] * text + [IMAGE] * (h * w)
        grids.append((1, 2 * h, 2 * w))
    tokens += [1] * tail
    found = mrope_positions(np.array(tokens), grids, image_token_id=IMAGE, merge_size=2)
    if not grids:
        assert found.tolist() == [list(range(tail))] * 3
        return
    ids = torch.tensor([tokens])
    expected, _ = model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == IMAGE).int(),
        image_grid_thw=torch.tensor(grids),
        attention_mask=torch.ones_like(ids),
    )
    assert torch.equal(torch.from_numpy(found), expected[:, 0].long())


_MODEL = []


def _rope_index_owner():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    if not _MODEL:
        config = Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=1, num_key_value_heads=1,
                rope_parameters=dict(
                    rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]
                ),
            ),
            vision_config=dict(
                depth=1, hidden_size=16, num_heads=1, intermediate_size=16, out_hidden_size=16
            ),
            image_token_id=IMAGE,
        )  # fmt: skip
        _MODEL.append(Qwen2_5_VLModel._from_config(config))
    return _MODEL[0]


def test_a_truncated_image_is_an_error_with_both_counts() -> None:
    with pytest.raises(ValueError, match=r"5 image placeholders.*\[6\] visual tokens"):
        mrope_positions(
            np.array([1] + [IMAGE] * 5), [(1, 4, 6)], image_token_id=IMAGE, merge_size=2
        )
    with pytest.raises(ValueError, match="are not a run"):
        mrope_positions(
            np.array([IMAGE] * 3 + [1] + [IMAGE] * 3), [(1, 4, 6)],
            image_token_id=IMAGE, merge_size=2,
        )  # fmt: skip
