"""A source read once: its rows, checked and measured, in a folder that every rank maps.

Reading 300,000 prompts with images means decoding every one. It is done by the first rank alone,
with all of its cores (``data.index``), and kept in ``run.data_cache`` under a name made of
everything that it depends on: the files and their dates, the source's settings, the model's
tokenizer and processor. The next start, and every other rank, opens the folder in milliseconds.

    rows.bin         a row after the other, JSON, compressed; their ends in row_ends.npy
    sizes.npy        [rows, 2] int32: tokens of the prompt or demonstration; trained ones of it
    pictures.npy     [rows, 3] int32: images, largest width and height as the model sees them
    images.bin       images that lie in no file of their own, or are written anew
    images.npy       [uses, 2] int64: begin and end in images.bin, row after row
    first_image.npy  [rows] int64: a row's first entry in images.npy
    files.json       images that do: path, bytes, date
    meta.json        what was found (``Reading``)

A store never changes: one that is made anew is another folder beside it, and ``CURRENT`` names the
one to open. Runs that have the old one open go on with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovr_fast.data.errors import DataError
from ovr_fast.records import ImageFile, ImageLimits, Prompt

VERSION = 3
CURRENT = "current"


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A part of a file that holds an image."""

    path: Path
    begin: int
    end: int

    def read_bytes(self) -> bytes:
        """The image's file."""
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            return file.read(self.end - self.begin)


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A prompt as it is kept."""

    data: bytes  # compressed JSON
    tokens: int
    trained: int
    pictures: tuple[int, int, int]  # images, largest width and height, pixels
    images: tuple[tuple[str, bytes], ...]  # digest and file of those without a file of their own
    files: tuple[tuple[str, int, int], ...]  # path, bytes, date in nanoseconds of the others


def stored(
    prompt: Prompt, *, tokens: int, trained: int, pictures: tuple[int, int, int]
) -> StoredRow:
    """A prompt as it is kept."""
    own, files, entries = [], [], []
    for image in prompt.images:
        if isinstance(image.stored, bytes):
            own.append((image.digest, image.stored))
            entries.append([image.digest, image.origin, None])
        else:
            entries.append([image.digest, image.origin, str(Path(image.stored).absolute())])
        if image.read_from is not None:  # also one that was written anew may change
            found = os.stat(image.read_from)
            path = str(Path(image.read_from).absolute())
            files.append((path, found.st_size, found.st_mtime_ns))
    row = [
        prompt.id, prompt.data_source, prompt.messages, prompt.answer, prompt.response, entries,
        prompt.columns,
    ]  # fmt: skip
    return StoredRow(
        data=zlib.compress(json.dumps(row, ensure_ascii=False).encode(), 1),
        tokens=tokens,
        trained=trained,
        pictures=pictures,
        images=tuple(own),
        files=tuple(files),
    )


class StoreWriter:
    """Writes a store; it is there whole or not at all.

    Args:
        place: folder of the stores of one key.

    Raises:
        DataError: it cannot be written; nothing half-written remains.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        with _writing(place):
            place.mkdir(parents=True, exist_ok=True)
            self.partial = Path(tempfile.mkdtemp(suffix=".partial", dir=place))
        self._rows = open(self.partial / "rows.bin", "wb")  # noqa: SIM115 - closed by finish
        self._images = open(self.partial / "images.bin", "wb")  # noqa: SIM115
        self._ends, self._sizes, self._pictures = array("q"), array("i"), array("i")
        self._uses, self._first = array("q"), array("q")
        self._places: dict[str, tuple[int, int]] = {}  # in images.bin, by digest
        self._files: dict[str, tuple[int, int]] = {}

    def add(self, row: StoredRow) -> None:
        """The next row."""
        with _writing(self.place):
            self._write(row)

    def _write(self, row: StoredRow) -> None:
        self._rows.write(row.data)
        self._ends.append(self._rows.tell())
        self._sizes.extend((row.tokens, row.trained))
        self._pictures.extend(row.pictures)
        self._first.append(len(self._uses) // 2)
        for digest, data in row.images:
            if digest not in self._places:
                begin = self._images.tell()
                self._images.write(data)
                self._places[digest] = (begin, begin + len(data))
            self._uses.extend(self._places[digest])
        self._files.update((path, (size, date)) for path, size, date in row.files)

    def __len__(self) -> int:
        return len(self._ends)

    def finish(self, meta: dict[str, Any]) -> Path:
        """Write what is left, and make it the current one; returns its folder."""
        with _writing(self.place):
            return self._finish(meta)

    def _finish(self, meta: dict[str, Any]) -> Path:
        self._rows.close()
        self._images.close()
        for name, values, shape, kind in (
            ("row_ends", self._ends, (-1,), np.int64),
            ("sizes", self._sizes, (-1, 2), np.int32),
            ("pictures", self._pictures, (-1, 3), np.int32),
            ("images", self._uses, (-1, 2), np.int64),
            ("first_image", self._first, (-1,), np.int64),
        ):
            np.save(self.partial / f"{name}.npy", np.array(values, dtype=kind).reshape(shape))
        files = [[path, *about] for path, about in self._files.items()]
        (self.partial / "files.json").write_text(json.dumps(files))
        (self.partial / "meta.json").write_text(json.dumps(meta))
        final = self.partial.with_suffix("")
        self.partial.rename(final)
        pointer = self.place / f"{final.name}.pointer"
        pointer.write_text(final.name)
        pointer.replace(self.place / CURRENT)
        return final

    def discard(self) -> None:
        """Leave nothing behind."""
        for file in (self._rows, self._images):
            with contextlib.suppress(OSError):  # what is left in it does not fit the disk either
                file.close()
        shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.place.rmdir()  # if nothing else is in it


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{place}: what is read of the data cannot be kept ({error.strerror or error}); set "
            "run.data_cache to a folder with room"
        ) from error


class StoredPrompts:
    """The prompts of a store, read when they are asked for.

    Args:
        folder: of the store.
        kept: places of the rows that count; None: all.
    """

    def __init__(self, folder: Path, kept: np.ndarray | None = None) -> None:
        self.folder = folder
        self._rows = open(folder / "rows.bin", "rb", buffering=0)  # noqa: SIM115 - kept open
        self._ends = np.load(folder / "row_ends.npy", mmap_mode="r")
        self._sizes = np.load(folder / "sizes.npy", mmap_mode="r")
        self._pictures = np.load(folder / "pictures.npy", mmap_mode="r")
        self._uses = np.load(folder / "images.npy", mmap_mode="r")
        self._first = np.load(folder / "first_image.npy", mmap_mode="r")
        self.kept = np.arange(len(self._ends)) if kept is None else kept

    def within(self, limit: int) -> StoredPrompts:
        """Those of at most ``limit`` tokens."""
        return StoredPrompts(self.folder, np.flatnonzero(np.asarray(self._sizes[:, 0]) <= limit))

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Prompt:
        place = int(self.kept[index])
        begin = int(self._ends[place - 1]) if place else 0
        data = os.pread(self._rows.fileno(), int(self._ends[place]) - begin, begin)
        identity, source, messages, answer, response, entries, columns = json.loads(
            zlib.decompress(data)
        )
        use, images = int(self._first[place]), []
        for digest, origin, path in entries:
            if path is None:
                begin, end = (int(edge) for edge in self._uses[use])
                use += 1
                held: Any = FileSlice(self.folder / "images.bin", begin, end)
            else:
                held = Path(path)
            images.append(ImageFile(digest=digest, stored=held, origin=origin))
        return Prompt(
            id=identity,
            data_source=source,
            messages=tuple(messages),
            images=tuple(images),
            answer=answer,
            response=response,
            columns=columns,
        )

    def size(self, index: int) -> tuple[int, int]:
        """Tokens of a prompt or demonstration, and how many of them are trained."""
        tokens, trained = self._sizes[int(self.kept[index])]
        return int(tokens), int(trained)

    def image_limits(self) -> ImageLimits:
        """The most images of a prompt, and the largest sides of an image as the model sees it."""
        if not len(self.kept):
            return ImageLimits(count=0, width=0, height=0)
        count, width, height = (int(most) for most in self._pictures[self.kept].max(axis=0))
        return ImageLimits(count=count, width=width, height=height)


def current(place: Path) -> Path | None:
    """The store to open of those of one key; None where there is none, where an image has changed
    since, or where one was missing or broken that may have been mended."""
    try:
        folder = place / (place / CURRENT).read_text()
    except OSError:
        return None
    meta = read_meta(folder)
    return folder if meta is not None and not meta.get("images_dropped") else None


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What was found when the store was written; None where there is none, or where an image has
    changed since."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files = json.loads((folder / "files.json").read_text())
    except (OSError, ValueError):
        return None
    parts = [files[begin : begin + 1000] for begin in range(0, len(files), 1000)]
    with ThreadPoolExecutor(16) as pool:  # a network's file system answers slowly, to many at once
        return meta if all(pool.map(_unchanged, parts)) else None


def _unchanged(files: list[list[Any]]) -> bool:
    for path, size, date in files:
        try:
            found = os.stat(path)
        except OSError:
            return False
        if (found.st_size, found.st_mtime_ns) != (size, date):
            return False
    return True


def widest(limits: Iterable[ImageLimits]) -> ImageLimits:
    """The limits of all together."""
    found = list(limits)
    return ImageLimits(
        count=max((limit.count for limit in found), default=0),
        width=max((limit.width for limit in found), default=0),
        height=max((limit.height for limit in found), default=0),
    )
