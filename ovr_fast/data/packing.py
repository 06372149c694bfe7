"""Packs sequences end to end into microbatches under a token cap."""

from __future__ import annotations

import bisect
from collections.abc import Sequence as List

import numpy as np
import torch

from ovr_fast.data.positions import MRopeCache
from ovr_fast.records import ImageFile, Microbatch, Segments, Sequence


def assign_bins(lengths: List[int], cap: int, costs: List[float] | None = None) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most ``cap``: as few as best-fit decreasing needs,
    then, where the room allows, of similar cost, so that no microbatch holds up a pipeline.

    Deterministic in its arguments. Bins come out with their indices ascending.

    Args:
        lengths: tokens of each sequence.
        cap: tokens of a bin.
        costs: of each sequence; None: its length.

    Raises:
        ValueError: one length alone is over the cap.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > cap:
        raise ValueError(
            f"sequence {order[0]} has {lengths[order[0]]} tokens, over the {cap} of a microbatch; "
            "raise max_tokens_per_microbatch or shorten prompts and responses"
        )
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), sorted
    for index in order:
        place = bisect.bisect_left(free, (lengths[index], -1))
        if place == len(free):
            free.append((cap, len(bins)))
            bins.append([])
        room, best = free.pop(place)
        bins[best].append(index)
        bisect.insort(free, (room - lengths[index], best))
    even = _even_bins(
        lengths, cap, list(map(float, lengths)) if costs is None else costs, len(bins)
    )
    return [sorted(chosen) for chosen in even or bins]


def _even_bins(
    lengths: List[int], cap: int, costs: List[float], count: int
) -> list[list[int]] | None:
    """``count`` bins, filled in order of falling cost, each sequence into the cheapest bin that has
    room; None where a sequence finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads, rooms = [0.0] * count, [cap] * count
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        with_room = [b for b in range(count) if rooms[b] >= lengths[index]]
        if not with_room:
            return None
        chosen = min(with_room, key=lambda b: (loads[b], b))
        bins[chosen].append(index)
        loads[chosen] += costs[index]
        rooms[chosen] -= lengths[index]
    return bins


def pack(
    sequences: List[Sequence],
    *,
    positions: MRopeCache,
    max_tokens: int,
    multiple: int = 1,
    costs: List[float] | None = None,
) -> list[Microbatch]:
    """Pack sequences into microbatches of at most ``max_tokens``.

    The microbatches name their images; ``VisionEncoder`` adds the visual tokens.

    Args:
        sequences: to pack; ``Microbatch.sequence_ids`` are places in this list.
        positions: M-RoPE positions, shared by all samples of a prompt.
        max_tokens: of a microbatch, dummy tokens not counted.
        multiple: of which a microbatch's token count must be (the tensor ranks, which split its
            tokens); up to ``multiple - 1`` dummy tokens fill up, a segment of their own that no
            loss sees.
        costs: of every sequence, to make microbatches of similar cost; None: their lengths.

    Raises:
        ValueError: a sequence is over the cap.
        DataError: placeholders and images disagree.
    """
    bins = assign_bins([len(sequence.tokens) for sequence in sequences], max_tokens, costs)
    return [_pack_one(sequences, chosen, positions, multiple) for chosen in bins]


def _pack_one(
    sequences: List[Sequence], chosen: list[int], table: MRopeCache, multiple: int
) -> Microbatch:
    packed = [sequences[index] for index in chosen]
    positions = [table(sequence) for sequence in packed]
    images: list[ImageFile] = [image for sequence in packed for image in sequence.images]
    rows, offset = [], 0
    for sequence in packed:
        rows.append(sequence.response_places - 1 + offset)
        offset += len(sequence.tokens)
    runs = [sequence.tokens for sequence in packed]
    if filler := -offset % multiple:
        runs.append(np.full(filler, runs[0][0]))
        positions.append(np.zeros((3, filler), dtype=np.int64))
    tokens = np.concatenate(runs)
    return Microbatch(
        tokens_T=torch.from_numpy(tokens),
        positions_3T=torch.from_numpy(np.concatenate(positions, axis=1)),
        segments=Segments.of([len(run) for run in runs]),
        predictor_index_R=torch.from_numpy(np.concatenate(rows)),
        labels_R=torch.from_numpy(np.concatenate([s.tokens[s.response_places] for s in packed])),
        responses=Segments.of([sequence.response_length for sequence in packed]),
        rollout_logprobs_R=torch.from_numpy(np.concatenate([s.rollout_logprobs for s in packed])),
        rewards_S=tuple(sequence.reward for sequence in packed),
        advantages_S=tuple(sequence.advantage for sequence in packed),
        sequence_ids=tuple(chosen),
        images=tuple(images),
        visual_index_G=torch.from_numpy(np.flatnonzero(tokens == table.image_token_id)),
    )
