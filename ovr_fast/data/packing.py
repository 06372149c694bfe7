"""Packs sequences end to end into microbatches under a token cap."""

from __future__ import annotations

import numpy as np
import torch

from ovr_fast.batch import PackedBatch, Picture, Sequence
from ovr_fast.data.vision import PictureProcessor, mrope_positions


def assign_bins(lengths: list[int], cap: int) -> list[list[int]]:
    """Best-fit decreasing: bins of indices whose lengths sum to at most ``cap``.

    Deterministic in ``lengths``. Bins come out with their indices ascending.

    Raises:
        ValueError: one length alone is over the cap.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > cap:
            raise ValueError(
                f"sequence {index} has {length} tokens, over the {cap} of a microbatch; "
                "raise max_tokens_per_microbatch or shorten prompts and responses"
            )
        fits = [b for b, free in enumerate(room) if free >= length]
        if fits:
            best = min(fits, key=lambda b: (room[b], b))
            bins[best].append(index)
            room[best] -= length
        else:
            bins.append([index])
            room.append(cap - length)
    return [sorted(b) for b in bins]


def balance(lengths: list[int], ranks: int) -> list[list[int]]:
    """Indices per rank, the longest first, dealt in a snake so that each rank gets like shares.

    Every rank gets at least one index where there are at least ``ranks`` of them.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for place, index in enumerate(order):
        turn, seat = divmod(place, ranks)
        shares[seat if turn % 2 == 0 else ranks - 1 - seat].append(index)
    return [sorted(share) for share in shares]


def pack(
    sequences: list[Sequence],
    indices: list[int],
    *,
    positions: PositionTable,
    max_tokens: int,
    multiple: int = 1,
) -> list[PackedBatch]:
    """Pack ``sequences[i] for i in indices`` into microbatches of at most ``max_tokens``.

    The batches name their pictures; ``PictureEncoder`` gives them visual tokens.

    Args:
        positions: of the prompts, shared by all samples that it is given for.
        multiple: of which a microbatch's token count must be (the tensor ranks, which share out
            its tokens); up to ``multiple - 1`` tokens that nobody looks at make up the rest.

    Raises:
        ValueError: a sequence is over the cap, or placeholders and pictures disagree.
    """
    bins = assign_bins([len(sequences[i].tokens) for i in indices], max_tokens)
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
