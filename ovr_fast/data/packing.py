"""Packs sequences end to end into microbatches under a token cap."""

from __future__ import annotations

import bisect
from collections.abc import Hashable
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
    _refuse_longer(lengths, cap)
    bins = _best_fit(lengths, cap)
    even = _even_bins(
        lengths, cap, list(map(float, lengths)) if costs is None else costs, len(bins)
    )
    return [sorted(chosen) for chosen in even or bins]


def _refuse_longer(lengths: List[int], cap: int) -> None:
    longest = max(lengths, default=0)
    if longest > cap:
        raise ValueError(
            f"sequence {lengths.index(longest)} has {longest} tokens, over the {cap} of a "
            "microbatch; raise max_tokens_per_microbatch or shorten prompts and responses"
        )


def _best_fit(lengths: List[int], cap: int) -> list[list[int]]:
    """Sequences in order of falling length, each into the fullest bin that has room."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
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
    return bins


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


def assign_groups(
    lengths: List[int], groups: List[Hashable], cap: int, costs: List[float] | None = None
) -> list[list[int]]:
    """``assign_bins`` that keeps sequences of one group together: each group fills bins as if it
    were alone, and what these hold is packed.

    That takes up to 9 % more bins, and leaves a quarter to 0.6 of the prompts to compute (four
    responses to each of 2,000 to 9,500 tokens; ``test_packing.py``).

    Args:
        groups: of each sequence.
    """
    _refuse_longer(lengths, cap)
    costs = list(map(float, lengths)) if costs is None else costs
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    pieces = [
        [group[i] for i in chosen]
        for group in members.values()
        for chosen in _best_fit([lengths[i] for i in group], cap)
    ]
    bins = assign_bins(
        [sum(lengths[i] for i in piece) for piece in pieces],
        cap,
        [sum(costs[i] for i in piece) for piece in pieces],
    )
    return [sorted(i for piece in chosen for i in pieces[piece]) for chosen in bins]


def pack(
    sequences: List[Sequence],
    *,
    positions: MRopeCache,
    max_tokens: int,
    multiple: int = 1,
    costs: List[float] | None = None,
    share_prefixes: bool = False,
) -> list[Microbatch]:
    """Pack sequences into microbatches of at most ``max_tokens``.

    The microbatches name their images; ``VisionEncoder`` adds the visual tokens.

    Args:
        sequences: to pack; ``Microbatch.sequence_ids`` are places in this list.
        positions: M-RoPE positions, shared by all samples of a prompt.
        max_tokens: of a microbatch, dummy tokens not counted, and a shared prompt counted with each
            of its responses: what attention keeps grows with that.
        multiple: of which a microbatch's token count must be (the tensor ranks, which split its
            tokens); up to ``multiple - 1`` dummy tokens fill up, a segment of their own that no
            loss sees.
        costs: of every sequence, to make microbatches of similar cost; None: their lengths.
        share_prefixes: the responses to one prompt in a microbatch have it once (``Branches``).

    Raises:
        ValueError: a sequence is over the cap.
        DataError: placeholders and images disagree.
    """
    lengths = [len(sequence.tokens) for sequence in sequences]
    if share_prefixes:
        prompts = [_prompt(sequence) for sequence in sequences]
        bins = assign_groups(lengths, prompts, max_tokens, costs)
    else:
        prompts = list(range(len(sequences)))
        bins = assign_bins(lengths, max_tokens, costs)
    microbatches = []
    for chosen in bins:
        groups: dict[Hashable, list[int]] = {}
        for index in chosen:
            groups.setdefault(prompts[index], []).append(index)
        cost = float(sum(lengths[i] if costs is None else costs[i] for i in chosen))
        microbatches.append(_pack_one(sequences, list(groups.values()), positions, multiple, cost))
    return microbatches


def _prompt(sequence: Sequence) -> Hashable:
    """What sequences of one prompt have in common, and others do not."""
    digests = tuple(image.digest for image in sequence.images)
    return sequence.tokens[: sequence.response_start].tobytes(), digests


def _pack_one(
    sequences: List[Sequence],
    groups: list[list[int]],
    table: MRopeCache,
    multiple: int,
    cost: float,
) -> Microbatch:
    """A group of more than one is its prompt, then its responses; its sequences differ in nothing
    before them."""
    packed: list[int] = []
    images: list[ImageFile] = []
    runs, positions, prefixes, rows = [], [], [], []
    offset = 0

    def add(sequence: Sequence, part: slice, prefix: int) -> None:
        runs.append(sequence.tokens[part])
        positions.append(table(sequence)[:, part])
        prefixes.append(prefix)

    for group in groups:
        first, prefix, shared, start = sequences[group[0]], -1, 0, offset
        if len(group) > 1:
            prefix, shared = len(runs), first.response_start
            add(first, slice(shared), -1)
            offset += shared
        images += first.images if shared else [i for s in group for i in sequences[s].images]
        for index in group:
            sequence = sequences[index]
            predictors = sequence.response_places - 1
            inside = predictors < shared  # the first response token's, the prompt's last
            rows.append(predictors + np.where(inside, start, offset - shared))
            add(sequence, slice(shared, None), prefix)
            offset += len(sequence.tokens) - shared
        packed += group
    if filler := -offset % multiple:
        runs.append(np.full(filler, runs[0][0]))
        positions.append(np.zeros((3, filler), dtype=np.int64))
        prefixes.append(-1)
    tokens = np.concatenate(runs)
    chosen = [sequences[index] for index in packed]
    return Microbatch(
        tokens_T=torch.from_numpy(tokens),
        positions_3T=torch.from_numpy(np.concatenate(positions, axis=1)),
        segments=Segments.of([len(run) for run in runs], prefixes),
        predictor_index_R=torch.from_numpy(np.concatenate(rows)),
        labels_R=torch.from_numpy(np.concatenate([s.tokens[s.response_places] for s in chosen])),
        responses=Segments.of([sequence.response_length for sequence in chosen]),
        rollout_logprobs_R=torch.from_numpy(np.concatenate([s.rollout_logprobs for s in chosen])),
        rewards_S=tuple(sequence.reward for sequence in chosen),
        advantages_S=tuple(sequence.advantage for sequence in chosen),
        sequence_ids=tuple(packed),
        cost=cost,
        images=tuple(images),
        visual_index_G=torch.from_numpy(np.flatnonzero(tokens == table.image_token_id)),
        known_R={
            name: torch.from_numpy(np.concatenate([s.known[name] for s in chosen]))
            for name in chosen[0].known
            if all(name in s.known for s in chosen)
        },
    )
