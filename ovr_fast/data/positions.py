"""M-RoPE positions of packed sequences."""

from __future__ import annotations

import numpy as np

from ovr_fast.data.errors import DataError
from ovr_fast.data.images import ImageProcessor
from ovr_fast.records import Sequence


def mrope_positions(
    tokens: np.ndarray, grids: list[tuple[int, int, int]], *, image_token_id: int, merge_size: int
) -> np.ndarray:
    """M-RoPE positions of one sequence (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text advances all three axes by one a token. The visual tokens of an image keep one time
    position and take their height and width from the merged grid; the text after an image goes
    on from the largest position used.

    Args:
        tokens: [n] int64 token ids with placeholders expanded.
        grids: (t, h, w) in patches, one per image in order.
        image_token_id: the placeholder.
        merge_size: patches per visual token along each side.

    Returns:
        [3, n] int64: time, height, width.

    Raises:
        DataError: the runs of placeholders do not match the grids.
    """
    positions = np.empty((3, len(tokens)), dtype=np.int64)
    placeholders = np.flatnonzero(tokens == image_token_id)
    sizes = [t * (h // merge_size) * (w // merge_size) for t, h, w in grids]
    if placeholders.size != sum(sizes):
        raise DataError(
            f"{placeholders.size} image placeholders in the tokens, but the {len(grids)} images "
            f"take {sizes} visual tokens; a prompt was probably truncated inside an image"
        )
    cursor = 0  # next token
    base = 0  # next position
    taken = 0  # placeholders consumed
    for (t, h, w), size in zip(grids, sizes, strict=True):
        start = int(placeholders[taken])
        if int(placeholders[taken + size - 1]) != start + size - 1:
            raise DataError(f"the {size} placeholders of an image at token {start} are not a run")
        text = start - cursor
        positions[:, cursor:start] = base + np.arange(text)
        base += text
        rows, columns = h // merge_size, w // merge_size
        grid = np.indices((t, rows, columns)).reshape(3, -1)
        # A still image has one time step (t = 1); its time positions do not advance.
        grid[0] = 0
        positions[:, start : start + size] = base + grid
        base += max(rows, columns)
        cursor = start + size
        taken += size
    positions[:, cursor:] = base + np.arange(len(tokens) - cursor)
    return positions


class MRopeCache:
    """Positions of prompts, computed once for all samples of a prompt. Make one for each step: it
    keeps all that it was asked for."""

    def __init__(self, processor: ImageProcessor, image_token_id: int) -> None:
        self.processor, self.image_token_id = processor, image_token_id
        self._known: dict[tuple, np.ndarray] = {}

    def __call__(self, sequence: Sequence) -> np.ndarray:
        """[3, n] int64 of the whole sequence: the prompt's, then one a response token.

        Raises:
            DataError: placeholders and images disagree; names the prompt and the images.
        """
        tokens, split = sequence.tokens, sequence.response_start
        placeholders = np.flatnonzero(tokens == self.image_token_id)
        if placeholders.size:  # a scored conversation may have images after its start
            split = max(split, int(placeholders[-1]) + 1)
        key = (tokens[:split].tobytes(), *(image.digest for image in sequence.images))
        if key not in self._known:
            try:
                self._known[key] = mrope_positions(
                    tokens[:split],
                    [self.processor.grid(image) for image in sequence.images],
                    image_token_id=self.image_token_id,
                    merge_size=self.processor.merge_size if sequence.images else 1,
                )
            except DataError as error:
                origins = ", ".join(image.origin for image in sequence.images)
                raise DataError(f"{sequence.name} ({origins}): {error}") from error
        prompt = self._known[key]
        following = prompt.max(initial=-1) + 1 + np.arange(len(tokens) - split)
        return np.concatenate([prompt, np.broadcast_to(following, (3, len(following)))], axis=1)
