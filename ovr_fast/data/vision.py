"""From pictures to patches and M-RoPE positions, on the CPU, once per distinct picture."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ovr_fast.batch import Picture
from ovr_fast.torchvision_ops import declare_if_broken


def load_picture(data: bytes, *, origin: str, path: Path | None = None) -> Picture:
    """A picture from the bytes of an image file, upright and opaque.

    Readers differ in what they make of an orientation tag and of transparency (black or white), and
    a picture turned on its side has as many tokens as an upright one. So a file with either is
    written anew here, and the trainer and the engine get the same pixels.

    Args:
        path: the file they came from; the picture then refers to it and holds no bytes.

    Raises:
        ValueError: the bytes are not a picture that can be decoded; names ``origin``.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if turned or image.has_transparency_data:
                data, path = _upright_and_opaque(image), None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{origin}: broken picture ({error}); replace or remove it") from error
    return Picture(digest=hashlib.sha256(data).hexdigest(), stored=path or data, origin=origin)


def _upright_and_opaque(image: Image.Image) -> bytes:
    """A PNG file of the picture as it is meant to be seen, on white."""
    seen = ImageOps.exif_transpose(image).convert("RGBA")
    paper = Image.new("RGBA", seen.size, "white")
    buffer = io.BytesIO()
    Image.alpha_composite(paper, seen).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


class PictureProcessor:
    """transformers' own image processor with a bounded cache, keyed by the picture's content.

    Args:
        folder: Hugging Face model folder with a ``preprocessor_config.json`` or
            ``processor_config.json``.
        cache_mib: pixels kept, MiB of float32 patches; the oldest go first.
    """

    def __init__(self, folder: str | Path, *, cache_mib: int = 512) -> None:
        declare_if_broken()
        from transformers import AutoImageProcessor
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        # The backend that transformers chooses here is the one that it chooses in vLLM: PIL and
        # torchvision resize differently, which made a log-prob gap of 3e-3 on resized pictures.
        self._processor = AutoImageProcessor.from_pretrained(folder)
        self.merge_size: int = self._processor.merge_size
        self._resize = smart_resize
        self._grids: dict[str, tuple[int, int, int]] = {}
        self._cache: OrderedDict[str, tuple[Tensor, tuple[int, int, int]]] = OrderedDict()
        self._cache_bytes = 0
        self._cache_limit = cache_mib * 2**20

    def __call__(self, picture: Picture) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches ``[P, D]`` float32 in merge order, and ``(t, h, w)`` in patches.

        Raises:
            ValueError: the processor refuses the picture (aspect ratio over 200); names it.
        """
        if picture.digest in self._cache:
            self._cache.move_to_end(picture.digest)
            return self._cache[picture.digest]
        with Image.open(io.BytesIO(picture.data)) as opened:
            image = opened.convert("RGB")
        try:
            out = self._processor(images=[image], return_tensors="pt")
        except ValueError as error:
            raise ValueError(f"{picture.origin}: {error}") from error
        t, h, w = (int(v) for v in out["image_grid_thw"][0])
        entry = (out["pixel_values"], (t, h, w))
        self._cache[picture.digest] = entry
        self._cache_bytes += entry[0].numel() * 4
        while self._cache_bytes > self._cache_limit and len(self._cache) > 1:
            _, (old, _) = self._cache.popitem(last=False)
            self._cache_bytes -= old.numel() * 4
        return entry

    def grid(self, picture: Picture) -> tuple[int, int, int]:
        """``(t, h, w)`` in patches, from the picture's header alone.

        Raises:
            ValueError: the processor refuses the picture (aspect ratio over 200); names it.
        """
        if picture.digest not in self._grids:
            with Image.open(io.BytesIO(picture.data)) as image:
                width, height = image.size
            settings = self._processor
            try:
                height, width = self._resize(
                    height,
                    width,
                    factor=settings.patch_size * settings.merge_size,
                    min_pixels=settings.size["shortest_edge"],
                    max_pixels=settings.size["longest_edge"],
                )
            except ValueError as error:
                raise ValueError(f"{picture.origin}: {error}") from error
            side = settings.patch_size
            self._grids[picture.digest] = (1, height // side, width // side)
        return self._grids[picture.digest]

    def visual_tokens(self, picture: Picture) -> int:
        """How many tokens the picture takes in the language model."""
        t, h, w = self.grid(picture)
        return t * h * w // self.merge_size**2


def mrope_positions(
    tokens: np.ndarray, grids: list[tuple[int, int, int]], *, image_token_id: int, merge_size: int
) -> np.ndarray:
    """M-RoPE positions of one sequence (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text advances all three axes by one a token. The visual tokens of a picture keep one time
    position and take their height and width from the merged grid; the text after a picture goes
    on from the largest position used.

    Args:
        tokens: [n] int64 token ids with placeholders expanded.
        grids: (t, h, w) in patches, one per picture in order.
        image_token_id: the placeholder.
        merge_size: patches per visual token along each side.

    Returns:
        [3, n] int64: time, height, width.

    Raises:
        ValueError: the runs of placeholders do not match the grids.
    """
    positions = np.empty((3, len(tokens)), dtype=np.int64)
    placeholders = np.flatnonzero(tokens == image_token_id)
    sizes = [t * (h // merge_size) * (w // merge_size) for t, h, w in grids]
    if placeholders.size != sum(sizes):
        raise ValueError(
            f"{placeholders.size} image placeholders in the tokens, but the {len(grids)} pictures "
            f"take {sizes} visual tokens; a prompt was probably truncated inside a picture"
        )
    cursor = 0  # next token
    base = 0  # next position
    taken = 0  # placeholders consumed
    for (t, h, w), size in zip(grids, sizes, strict=True):
        start = int(placeholders[taken])
        if int(placeholders[taken + size - 1]) != start + size - 1:
            raise ValueError(f"the {size} placeholders of a picture at token {start} are not a run")
        text = start - cursor
        positions[:, cursor:start] = base + np.arange(text)
        base += text
        rows, columns = h // merge_size, w // merge_size
        grid = np.indices((t, rows, columns)).reshape(3, -1)
        # A still picture has one time step (t = 1); its time positions do not advance.
        grid[0] = 0
        positions[:, start : start + size] = base + grid
        base += max(rows, columns)
        cursor = start + size
        taken += size
    positions[:, cursor:] = base + np.arange(len(tokens) - cursor)
    return positions


def stack_patches(entries: list[tuple[Tensor, tuple[int, int, int]]]) -> tuple[Tensor, Tensor]:
    """Patches of several pictures end to end ``[P, D]`` and their grids ``[I, 3]`` int64."""
    patches = torch.cat([patches for patches, _ in entries])
    return patches, torch.tensor([grid for _, grid in entries], dtype=torch.int64)
