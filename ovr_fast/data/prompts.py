"""Data sets: JSONL, Parquet, or ``datasets``, with settable columns, mixed by weight."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ovr_fast.config import DataSource
from ovr_fast.data.errors import DataError, ImageError
from ovr_fast.data.images import load_image
from ovr_fast.records import ImageFile, Prompt

IMAGE_MARK = "<image>"


def read_rows(source: DataSource) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Each row with where it stands ("file:line"), lazily; a malformed line as its error, so that
    the lines after it can still be read.

    Raises:
        DataError: no such file, or an unknown or broken kind of file.
    """
    path = Path(source.path)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    row = DataError(f"{where}: not JSON ({error})")
                if not isinstance(row, dict | DataError):
                    row = DataError(f"{where}: a {type(row).__name__}, not an object")
                yield where, row
    elif path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as parquet

        try:
            file = parquet.ParquetFile(path)
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
        except OSError as error:  # pyarrow's own errors are among its subclasses
            raise DataError(f"{path}: not a Parquet file ({error})") from error
        except Exception as error:
            if type(error).__module__.startswith("pyarrow"):
                raise DataError(f"{path}: not a Parquet file ({error})") from error
            raise
    elif path.suffix in (".jsonl", ".json", ".parquet"):
        raise DataError(f"{path} does not exist")
    else:
        yield from _read_dataset(source)


def _read_dataset(source: DataSource) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source.path!r} is no .jsonl or .parquet file; to read it as a dataset, "
            'install the extra "datasets"'
        ) from error
    try:
        if (Path(source.path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(source.path)[source.split]
        elif (Path(source.path) / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(source.path)
        else:
            loaded = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # the package raises many types, all meaning "not to be had"
        raise DataError(
            f"{source.path}, split {source.split!r}: neither a .jsonl or .parquet file nor a data "
            f"set that can be loaded ({type(error).__name__}: {error})"
        ) from error
    # Images stay the files they are: decoding and encoding again would change their digests.
    kind = loaded.features.get(source.images)
    if isinstance(kind, datasets.Image):
        loaded = loaded.cast_column(source.images, datasets.Image(decode=False))
    elif isinstance(getattr(kind, "feature", None), datasets.Image):
        loaded = loaded.cast_column(source.images, datasets.List(datasets.Image(decode=False)))
    for number, row in enumerate(loaded, 1):
        yield f"{source.path}[{source.split}]:row {number}", row


def parse_row(row: dict[str, Any] | DataError, *, source: DataSource, where: str) -> Prompt:
    """One row as a prompt, its images loaded and checked.

    Raises:
        ImageError: a missing or broken image.
        DataError: a malformed line, a missing column, or marks that do not match.
    """
    if isinstance(row, DataError):
        raise row
    if source.prompt not in row:
        raise DataError(
            f"{where}: no column {source.prompt!r} (it has {sorted(row)}); set the source's prompt"
        )
    raw_images = row.get(source.images)
    if raw_images is None:
        raw_images = []
    if not isinstance(raw_images, list | tuple):
        raw_images = [raw_images]
    folder = Path(source.path).parent
    images = tuple(
        _image(item, folder=folder, where=f"{where}, image {i}")
        for i, item in enumerate(raw_images)
    )
    messages = _messages(row[source.prompt], len(images), where)
    answer, response = row.get(source.answer), row.get(source.response)
    return Prompt(
        id=str(row.get("id", where)),
        data_source=source.name or Path(source.path).stem,
        messages=messages,
        images=images,
        answer=None if answer is None else str(answer),
        response=None if response is None else str(response),
    )


def _image(item: Any, *, folder: Path, where: str) -> ImageFile:
    """From a path, bytes, a Hugging Face image record, or a decoded image."""
    if isinstance(item, dict):  # {"bytes": ..., "path": ...}, as `datasets` stores images
        item = item.get("bytes") or item.get("path")
    path = None
    if isinstance(item, str):
        path = folder / item
        try:
            item, where = path.read_bytes(), f"{where} ({path})"
        except OSError as error:
            raise ImageError(f"{where}: image {path}: {error.strerror}") from error
    elif hasattr(item, "save"):  # a decoded image
        buffer = io.BytesIO()
        item.save(buffer, format="PNG")
        item = buffer.getvalue()
    if not isinstance(item, bytes):
        raise ImageError(f"{where}: a {type(item).__name__}, neither a path nor bytes")
    return load_image(item, origin=where, path=path)


def _messages(prompt: Any, images: int, where: str) -> tuple[dict, ...]:
    """Chat messages whose image parts match the images."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt
    ):
        raise DataError(f"{where}: the prompt is neither text nor a list of chat messages")
    messages, places = [], 0
    for message in prompt:
        content = message["content"]
        if isinstance(content, str):
            content = _split_marks(content)
        places += sum(part.get("type") == "image" for part in content)
        messages.append({"role": message["role"], "content": content})
    if places == 0 and images:
        user = next((m for m in messages if m["role"] == "user"), messages[0])
        user["content"] = [{"type": "image"}] * images + user["content"]
        places = images
    if places != images:
        raise DataError(f"{where}: {places} image places in the prompt for {images} images")
    return tuple({"role": m["role"], "content": _plain_if_text(m["content"])} for m in messages)


def _split_marks(text: str) -> list[dict]:
    parts: list[dict] = []
    for i, piece in enumerate(text.split(IMAGE_MARK)):
        if i:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _plain_if_text(content: list[dict]) -> str | list[dict]:
    if all(part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    return [{"type": "image"} if p.get("type") == "image" else p for p in content]


def read_source(source: DataSource, *, need: str | None, limit: int | None = None) -> list[Prompt]:
    """All prompts of a source.

    Args:
        need: "answer" or "response", a field that every row must have; None for neither.
        limit: stop after this many rows.

    Raises:
        DataError: the source is empty, or a row cannot be used; names file and line.
    """
    prompts = []
    for where, row in read_rows(source):
        prompt = parse_row(row, source=source, where=where)
        if need and getattr(prompt, need) is None:
            column = getattr(source, need)
            raise DataError(f"{where}: no {need} in column {column!r}; set the source's {need}")
        prompts.append(prompt)
        if limit is not None and len(prompts) == limit:
            break
    if not prompts:
        raise DataError(f"{source.path} holds no rows")
    return prompts


class Mixture:
    """Several data sources, mixed by weight into one endless seeded stream.

    Each source is walked in a shuffled order of its own, reshuffled after every pass, so the
    stream is a function of the seed and can be continued from any position.
    """

    def __init__(self, pools: list[list[Prompt]], weights: list[float], *, seed: int) -> None:
        if any(weight <= 0 for weight in weights):
            raise DataError(f"source weights {weights} must be over 0")
        self.pools = pools
        self.weights = np.asarray(weights) / sum(weights)
        self.seed = seed
        self.drawn = [0] * len(pools)
        self.position = 0
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts of the stream."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Prompt:
        # Largest deficit first: after any number of draws each source is within one of its share.
        share = self.weights * (self.position + 1)
        pick = int(np.argmax(share - np.asarray(self.drawn)))
        size = len(self.pools[pick])
        epoch, place = divmod(self.drawn[pick], size)
        key = (pick, epoch)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != pick}
            generator = np.random.default_rng([self.seed, pick, epoch])
            self._orders[key] = generator.permutation(size)
        self.drawn[pick] += 1
        self.position += 1
        return self.pools[pick][self._orders[key][place]]

    def state(self) -> dict:
        """What ``restore`` needs to go on from here."""
        return {"drawn": list(self.drawn), "position": self.position}

    def restore(self, state: dict) -> None:
        """Go on from a saved position."""
        self.drawn, self.position = list(state["drawn"]), state["position"]
