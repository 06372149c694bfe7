"""Packs sequences end to end into microbatches under a token cap."""

from __future__ import annotations

import bisect
import heapq

import numpy as np
import torch

from ovr_fast.batch import PackedBatch, Picture, Sequence
from ovr_fast.data.vision import PictureProcessor, mrope_positions


def assign_bins(lengths: list[int], cap: int, costs: list[float] | None = None) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most ``cap``: as few as best-fit decreasing needs,
    then, where the room allows, of like cost, so that no microbatch holds up a pipeline.

    Deterministic in its arguments. Bins come out with their indices ascending.

    Args:
        costs: of each; None: its length.

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
    lengths: list[int], cap: int, costs: list[float], count: int
) -> list[list[int]] | None:
    """``count`` bins, the dearest index first, each into the cheapest bin with room; None where an
    index finds no room."""
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


def deal(costs: list[float] | list[int], ranks: int) -> list[list[int]]:
    """Indices for each rank, the dearest first, each to the rank with the least so far.

    Deterministic in ``costs``; a rank gets none where there are fewer indices than ranks.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]


def level(shares: list[list[int]], costs: list[float], *, tolerance: float = 0.005) -> None:
    """Move single indices from the dearest share to the cheapest, in place, until the dearest is at
    most ``tolerance`` over the mean or no move helps. No share stays empty that can get one."""
    for share in shares:
        most = max(shares, key=len)
        if not share and len(most) > 1:
            cheapest = min(most, key=lambda i: (costs[i], i))
            most.remove(cheapest)
            share.append(cheapest)
    loads = [sum(costs[index] for index in share) for share in shares]
    mean = sum(loads) / len(loads)
    while True:
        rich = max(range(len(loads)), key=lambda rank: (loads[rank], -rank))
        poor = min(range(len(loads)), key=lambda rank: (loads[rank], rank))
        gap = loads[rich] - loads[poor]
        # Any cost under the gap narrows it, half of it closes it.
        helping = [index for index in shares[rich] if costs[index] < gap]
        if loads[rich] <= mean * (1 + tolerance) or not helping or len(shares[rich]) == 1:
            return
        index = min(helping, key=lambda i: (abs(costs[i] - gap / 2), i))
        shares[rich].remove(index)
        bisect.insort(shares[poor], index)
        loads[rich] -= costs[index]
        loads[poor] += costs[index]


def pack(
    sequences: list[Sequence],
    indices: list[int],
    *,
    positions: PositionTable,
    max_tokens: int,
    multiple: int = 1,
    costs: list[float] | None = None,
) -> list[PackedBatch]:
    """Pack ``sequences[i] for i in indices`` into microbatches of at most ``max_tokens``.

    The batches name their pictures; ``PictureEncoder`` gives them visual tokens.

    Args:
        positions: of the prompts, shared by all samples that it is given for.
        multiple: of which a microbatch's token count must be (the tensor ranks, which share out
            its tokens); up to ``multiple - 1`` tokens that nobody looks at make up the rest.
        costs: of every sequence, to make microbatches of like cost; None: their lengths.

    Raises:
        ValueError: a sequence is over the cap, or placeholders and pictures disagree.
    """
    bins = assign_bins(
        [len(sequences[i].tokens) for i in indices],
        max_tokens,
        None if costs is None else [costs[i] for i in indices],
    )
    starts = response_boundaries(sequences)
    return [
        _pack_one(sequences, starts, [indices[j] for j in chosen], positions, multiple)
        for chosen in bins
    ]


class PositionTable:
    """M-RoPE positions of prompts, made once for all samples of a prompt."""

    def __init__(self, processor: PictureProcessor, image_token_id: int) -> None:
        self.processor, self.image_token_id = processor, image_token_id
        self._known: dict[tuple, np.ndarray] = {}

    def __call__(self, sequence: Sequence) -> np.ndarray:
        """[3, n] int64 of the whole sequence: the prompt's, then one a response token.

        Raises:
            ValueError: placeholders and pictures disagree; names the prompt and the pictures.
        """
        tokens, split = sequence.tokens, sequence.response_start
        placeholders = np.flatnonzero(tokens == self.image_token_id)
        if placeholders.size:  # a scored conversation may have pictures after its start
            split = max(split, int(placeholders[-1]) + 1)
        key = (tokens[:split].tobytes(), *(picture.digest for picture in sequence.pictures))
        if key not in self._known:
            try:
                self._known[key] = mrope_positions(
                    tokens[:split],
                    [self.processor.grid(picture) for picture in sequence.pictures],
                    image_token_id=self.image_token_id,
                    merge_size=self.processor.merge_size if sequence.pictures else 1,
                )
            except ValueError as error:
                origins = ", ".join(picture.origin for picture in sequence.pictures)
                raise ValueError(f"{sequence.name} ({origins}): {error}") from error
        prompt = self._known[key]
        following = prompt.max(initial=-1) + 1 + np.arange(len(tokens) - split)
        return np.concatenate([prompt, np.broadcast_to(following, (3, len(following)))], axis=1)


def response_boundaries(sequences: list[Sequence]) -> np.ndarray:
    """[S + 1] int64: where each sequence's response stands when all are laid end to end."""
    return np.concatenate([[0], np.cumsum([s.response_length for s in sequences])]).astype(np.int64)


def _pack_one(
    sequences: list[Sequence],
    starts: np.ndarray,
    chosen: list[int],
    table: PositionTable,
    multiple: int,
) -> PackedBatch:
    positions, rows, targets, places = [], [], [], []
    pictures: list[Picture] = []
    offset = 0
    for index in chosen:
        sequence = sequences[index]
        positions.append(table(sequence))
        pictures += sequence.pictures
        length = len(sequence.tokens)
        rows.append(np.arange(sequence.response_start, length) - 1 + offset)
        targets.append(sequence.tokens[sequence.response_start :])
        places.append(np.arange(starts[index], starts[index + 1]))
        offset += length
    token_runs = [sequences[i].tokens for i in chosen]
    if filler := -offset % multiple:  # a sequence of its own, so that attention keeps it apart
        token_runs.append(np.full(filler, token_runs[0][0]))
        positions.append(np.zeros((3, filler), dtype=np.int64))
    tokens = np.concatenate(token_runs)
    lengths = [len(run) for run in token_runs]
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens),
        positions_3T=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens_S1=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        rows_R=torch.from_numpy(np.concatenate(rows)),
        targets_R=torch.from_numpy(np.concatenate(targets)),
        response_index_R=torch.from_numpy(np.concatenate(places)),
        sequence_indices_S=tuple(chosen),
        pictures=tuple(pictures),
        picture_rows=torch.from_numpy(np.flatnonzero(tokens == table.image_token_id)),
    )
