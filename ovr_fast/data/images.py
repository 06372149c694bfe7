"""From image files to patches, on the CPU, once per distinct image."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import warnings
from collections import Counter, OrderedDict
from collections.abc import Sequence as List
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ovr_fast.data.errors import ImageError
from ovr_fast.records import ImageFile, ImageLimits
from ovr_fast.torchvision_ops import declare_if_broken

Image.MAX_IMAGE_PIXELS = None  # ours is a setting, and named in its message
MAX_PIXELS = 100_000_000
KEPT_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP")
"""Files that any server's PIL opens, MPO (a camera's JPEG with a second view) as its first view;
others are written anew."""
KEPT_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
"""Modes of 8 bits a channel, of which every reader makes the same RGB."""


def read_image(
    item: Any, *, folder: Path, where: str, max_pixels: int, notes: Counter[str]
) -> ImageFile:
    """An image from what a row holds: a path, a ``file://`` or ``data:`` URL, base64 text, bytes, a
    record of bytes and path, or a decoded image.

    Args:
        folder: that paths start from.
        where: file, row and number of the image.
        max_pixels: an image of more is refused before it is decoded.
        notes: counts what was read otherwise than a reader might think.

    Raises:
        ImageError: none of these, or it cannot be read.
    """
    if isinstance(item, dict):
        found = [item.get(key) for key in ("bytes", "path", "url", "image")]
        item = next((value for value in found if value), None)
    path = None
    if isinstance(item, str):
        item, path = _from_text(item, folder, where)
        where = f"{where} ({path})" if path else where
    elif hasattr(item, "save"):  # a decoded image
        buffer = io.BytesIO()
        item.save(buffer, format="PNG")
        item = buffer.getvalue()
    elif isinstance(item, bytearray | memoryview):
        item = bytes(item)
    if not isinstance(item, bytes):
        kind = "nothing" if item is None else f"a {type(item).__name__}"
        raise ImageError(f"{where}: {kind}, neither a path nor bytes")
    return load_image(item, origin=where, path=path, max_pixels=max_pixels, notes=notes)


def _from_text(text: str, folder: Path, where: str) -> tuple[bytes, Path | None]:
    """The bytes that a text stands for, and the file that they came from."""
    if text[:5].lower() == "data:":
        head, _, body = text.partition(",")
        if ";base64" not in head:
            raise ImageError(f"{where}: a data URL that is not base64")
        return _from_base64(body, where), None
    scheme = text.partition("://")[0].lower() if "://" in text[:12] else ""
    if scheme == "file":
        text = unquote(urlparse(text).path)
    elif scheme:
        raise ImageError(
            f"{where}: {text[:100]}: nothing is downloaded; save the image and name the file"
        )
    path = folder / text
    try:
        return path.read_bytes(), path
    except (OSError, ValueError) as error:
        if len(text) >= 64 and not set(text) - _BASE64:
            return _from_base64(text, where), None
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{where}: image {str(path)[:300]}: {reason}") from error


_BASE64 = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_\r\n")


def _from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text.translate({45: 43, 95: 47}), validate=False)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{where}: not base64 ({error})") from error


def load_image(
    data: bytes,
    *,
    origin: str,
    path: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    notes: Counter[str] | None = None,
) -> ImageFile:
    """An image from the bytes of an image file: upright, opaque, 8 bits a channel, one frame.

    Readers differ in what they make of an orientation tag and of transparency (black or white), of
    16 bits (white) and of floating point (black), and an image turned on its side has as many
    tokens as an upright one. So such a file is written anew here, and the trainer and the servers
    get the same pixels.

    Args:
        path: the file they came from; the image then refers to it and holds no bytes.
        max_pixels: an image of more is refused before it is decoded.
        notes: counts what was written anew for a reason that a user may want to know.

    Raises:
        ImageError: the bytes cannot be decoded, or are too many pixels.
    """
    noted: Counter[str] = Counter() if notes is None else notes
    read_from = path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images (we have a limit) and of odd tags
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageError(
                        f"{origin}: {width} x {height} pixels, over max_image_pixels={max_pixels:,}"
                    )
                frames = getattr(image, "n_frames", 1)
                image.load()
                if anew := _why_anew(image, frames):
                    noted.update(anew)
                    data, path = _upright_and_opaque(image, origin), None
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{origin}: broken image (it begins with {data[:12]!r}, like no image that PIL opens); "
            "replace or remove it"
        ) from error
    except Exception as error:  # PIL's decoders raise anything on damaged files
        reason = str(error) or type(error).__name__
        raise ImageError(f"{origin}: broken image ({reason}); replace or remove it") from error
    digest = hashlib.sha256(data).hexdigest()
    return ImageFile(digest=digest, stored=path or data, origin=origin, read_from=read_from)


def _why_anew(image: Image.Image, frames: int) -> list[str]:
    """What of an image readers could see in different ways."""
    reasons = []
    if frames > 1 and image.format != "MPO":
        reasons.append("images of several frames, of which the first is used")
    if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        reasons.append("images turned upright")
    if image.has_transparency_data:
        reasons.append("images put on white")
    elif image.mode not in KEPT_MODES:
        reasons.append(f"images of mode {image.mode} scaled to 8 bits")
    elif image.format not in KEPT_FORMATS:
        reasons.append(f"{image.format} files written as PNG")
    return reasons


def _upright_and_opaque(image: Image.Image, origin: str) -> bytes:
    """A PNG file of the image as it is meant to be seen, on white."""
    seen = _eight_bits(ImageOps.exif_transpose(image), origin)
    if seen.has_transparency_data:
        clear = seen.convert("RGBA")
        seen = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    buffer = io.BytesIO()
    seen.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _eight_bits(image: Image.Image, origin: str) -> Image.Image:
    """Greyscale of more than 8 bits scaled: 16 bits by their range, floating point from 0 to 1 or
    to 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image, dtype=np.float64)
    low, high = float(np.nanmin(pixels)), float(np.nanmax(pixels))
    limit = 65535.0 if image.mode.startswith("I") else 1.0 if high <= 1.0 else 255.0
    if not (low >= 0.0 and high <= limit) or np.isnan(pixels).any():
        raise ImageError(
            f"{origin}: pixels from {low:g} to {high:g} (mode {image.mode}), which no rule maps to "
            "8 bits; convert the image"
        )
    return Image.fromarray(np.round(pixels * (255.0 / limit)).astype(np.uint8))


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


class HasImages(Protocol):
    """A prompt, or a benchmark's question."""

    @property
    def images(self) -> tuple[ImageFile, ...]:
        """What it shows."""


def image_limits(prompts: List[HasImages], processor: ImageProcessor) -> ImageLimits:
    """The most images of a prompt, and the largest sides of an image as the model sees it."""
    grids = [processor.grid(image) for prompt in prompts for image in prompt.images]
    return ImageLimits(
        count=max((len(prompt.images) for prompt in prompts), default=0),
        width=max((columns * processor.patch_size for _, _, columns in grids), default=0),
        height=max((rows * processor.patch_size for _, rows, _ in grids), default=0),
    )


def stack_patches(entries: list[tuple[Tensor, tuple[int, int, int]]]) -> tuple[Tensor, Tensor]:
    """Patches of several images end to end ``[P, D]`` and their grids ``[I, 3]`` int64."""
    patches = torch.cat([patches for patches, _ in entries])
    return patches, torch.tensor([grid for _, grid in entries], dtype=torch.int64)
