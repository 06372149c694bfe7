"""From image files to patches, on the CPU, once per distinct image."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ovr_fast.data.errors import ImageError
from ovr_fast.records import ImageFile
from ovr_fast.torchvision_ops import declare_if_broken


def load_image(data: bytes, *, origin: str, path: Path | None = None) -> ImageFile:
    """An image from the bytes of an image file, upright and opaque.

    Readers differ in what they make of an orientation tag and of transparency (black or white), and
    an image turned on its side has as many tokens as an upright one. So a file with either is
    written anew here, and the trainer and the servers get the same pixels.

    Args:
        path: the file they came from; the image then refers to it and holds no bytes.

    Raises:
        ImageError: the bytes cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if turned or image.has_transparency_data:
                data, path = _upright_and_opaque(image), None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{origin}: broken image ({error}); replace or remove it") from error
    return ImageFile(digest=hashlib.sha256(data).hexdigest(), stored=path or data, origin=origin)


def _upright_and_opaque(image: Image.Image) -> bytes:
    """A PNG file of the image as it is meant to be seen, on white."""
    seen = ImageOps.exif_transpose(image).convert("RGBA")
    paper = Image.new("RGBA", seen.size, "white")
    buffer = io.BytesIO()
    Image.alpha_composite(paper, seen).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


class ImageProcessor:
    """transformers' own image processor with a bounded cache, keyed by the image's content.

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
        # torchvision resize differently, which made a log-prob gap of 3e-3 on resized images.
        self._processor = AutoImageProcessor.from_pretrained(folder)
        self.merge_size: int = self._processor.merge_size
        self.patch_size: int = self._processor.patch_size
        self._resize = smart_resize
        self._grids: dict[str, tuple[int, int, int]] = {}
        self._cache: OrderedDict[str, tuple[Tensor, tuple[int, int, int]]] = OrderedDict()
        self._cache_bytes = 0
        self._cache_limit = cache_mib * 2**20

    def __call__(self, image: ImageFile) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches ``[P, D]`` float32 in merge order, and ``(t, h, w)`` in patches.

        Raises:
            ImageError: the processor refuses the image (aspect ratio over 200).
        """
        if image.digest in self._cache:
            self._cache.move_to_end(image.digest)
            return self._cache[image.digest]
        with Image.open(io.BytesIO(image.data)) as opened:
            pixels = opened.convert("RGB")
        try:
            out = self._processor(images=[pixels], return_tensors="pt")
        except ValueError as error:
            raise ImageError(f"{image.origin}: {error}") from error
        t, h, w = (int(v) for v in out["image_grid_thw"][0])
        entry = (out["pixel_values"], (t, h, w))
        self._cache[image.digest] = entry
        self._cache_bytes += entry[0].numel() * 4
        while self._cache_bytes > self._cache_limit and len(self._cache) > 1:
            _, (old, _) = self._cache.popitem(last=False)
            self._cache_bytes -= old.numel() * 4
        return entry

    def grid(self, image: ImageFile) -> tuple[int, int, int]:
        """``(t, h, w)`` in patches, from the image's header alone.

        Raises:
            ImageError: the processor refuses the image (aspect ratio over 200).
        """
        if image.digest not in self._grids:
            with Image.open(io.BytesIO(image.data)) as opened:
                width, height = opened.size
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
                raise ImageError(f"{image.origin}: {error}") from error
            side = settings.patch_size
            self._grids[image.digest] = (1, height // side, width // side)
        return self._grids[image.digest]

    def visual_tokens(self, image: ImageFile) -> int:
        """How many tokens the image takes in the language model."""
        t, h, w = self.grid(image)
        return t * h * w // self.merge_size**2


def stack_patches(entries: list[tuple[Tensor, tuple[int, int, int]]]) -> tuple[Tensor, Tensor]:
    """Patches of several images end to end ``[P, D]`` and their grids ``[I, 3]`` int64."""
    patches = torch.cat([patches for patches, _ in entries])
    return patches, torch.tensor([grid for _, grid in entries], dtype=torch.int64)
