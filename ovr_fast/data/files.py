"""Rows out of files: JSON Lines, JSON, CSV, Parquet, folders of them, and ``datasets``.

Everything that reads rows (the check, both stages, evaluation, ``score``, ``convert``) reads them
here. A row that cannot be read is yielded as its error, so that the rows after it still can.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ovr_fast.data.errors import DataError

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ROW_COLUMNS = frozenset(
    ("prompt", "messages", "conversations", "problem", "question", "instruction", "answer")
)
"""Of which a row has one, and an object around rows has none."""
_SPLIT = re.compile(r"(train|training|test|val|valid|validation|dev|eval)[-_.]")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""What describes a folder of images, one row a file."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as its file has it."""

    where: str  # "file:line", or "file:row n"
    folder: Path  # that paths in the row start from
    row: dict[str, Any] | DataError


def read_rows(path: str, *, split: str = "train") -> Iterator[RawRow]:
    """Each row of a file, a folder, a pattern of files or a dataset, lazily.

    Args:
        path: a file, its kind by its suffix, also compressed (.gz, .bz2, .xz); a folder or pattern
            (``data/*.parquet``) of such files, read in the order of their names; a folder of
            images with a metadata file; a dataset's folder or name.
        split: of a dataset, or of a folder whose files' names begin with it.

    Raises:
        DataError: no such file, or an unknown or broken kind of file.
    """
    place = Path(path)
    if place.is_dir():
        yield from _read_folder(place, split)
    elif kind_of(place):
        if not place.exists() and any(letter in path for letter in "*?["):
            found = sorted(glob.glob(path))
            if not found:
                raise DataError(f"{path}: no file has a name like this")
            for name in found:
                yield from _read_file(Path(name))
        else:
            yield from _read_file(place)
    elif place.is_file():
        raise DataError(f"{path}: of an unknown kind; known are {', '.join(KINDS)}, also .gz")
    else:
        yield from _read_dataset(path, split)


def files_of(path: str, *, split: str = "train") -> list[Path]:
    """The files that ``read_rows`` reads, or the dataset's; none for one that has only a name."""
    place = Path(path)
    if place.is_dir():
        if any((place / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
            return sorted(file for file in place.rglob("*") if file.is_file())
        named = [place / name for name in METADATA if (place / name).is_file()]
        return named[:1] or _files_in(place, split)
    if place.is_file():
        return [place]
    return [Path(name) for name in sorted(glob.glob(path))] if kind_of(place) else []


def count_rows(path: str, split: str) -> float:
    """About how many rows there are, without reading them; infinity where nothing says."""
    total = 0
    for file in files_of(path, split=split):
        kind = kind_of(file)
        if kind == ".parquet":
            import pyarrow.parquet as parquet

            total += parquet.ParquetFile(file).metadata.num_rows
        elif kind and file.suffix.lower() not in OPENERS:
            with open(file, "rb") as opened:
                while block := opened.read(2**24):
                    total += block.count(b"\n")
        else:
            return math.inf
    return total or math.inf


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read; "" for an unknown one."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1].lower() in OPENERS:
        suffixes.pop()
    last = suffixes[-1].lower() if suffixes else ""
    return last if last in KINDS else ""


def _read_folder(folder: Path, split: str) -> Iterator[RawRow]:
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        yield from _read_dataset(str(folder), split)
        return
    for name in METADATA:
        if (folder / name).is_file():
            yield from _read_file(folder / name)
            return
    files = _files_in(folder, split)
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: holds files of several kinds ({', '.join(sorted(kinds))}); name one, or a "
            "pattern such as *.parquet"
        )
    if not files:
        yield from _read_dataset(str(folder), split)
    for file in files:
        yield from _read_file(file)


def _files_in(folder: Path, split: str) -> list[Path]:
    """A folder's files that can be read, by name; those of the split where names begin with it."""
    files = sorted(
        file
        for place in (folder, folder / "data")
        if place.is_dir()
        for file in place.iterdir()
        if file.is_file() and kind_of(file)
    )
    splits = {match[1] for file in files if (match := _SPLIT.match(file.name))}
    if not splits:
        return files
    chosen = [file for file in files if re.match(rf"{re.escape(split)}[-_.]", file.name)]
    if not chosen:
        named = ", ".join(sorted(splits))
        raise DataError(f"{folder}: no file of split {split!r}; its files' names have {named}")
    return chosen


def _read_file(path: Path) -> Iterator[RawRow]:
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _read_parquet(path)
            return
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            if kind in (".csv", ".tsv"):
                yield from _read_csv(path, file, "\t" if kind == ".tsv" else ",")
            else:
                yield from _read_json(path, file)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _read_json(path: Path, file: BinaryIO) -> Iterator[RawRow]:
    """JSON Lines, or one JSON value over many lines: an array of rows, a row, rows one after the
    other, or an object whose one list is the rows."""
    start = file.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: UTF-16; convert it to UTF-8")
    file.seek(0)
    first = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    line = _first_line(file)
    if first[:1] == b"[" or (first[:1] == b"{" and (not _is_json(line) or _is_wrapper(line))):
        rows = _whole(path, file.read())
        if rows is not None:
            for number, row in enumerate(rows, 1):
                yield RawRow(f"{path}:row {number}", path.parent, _object(row, path, number, "row"))
            return
        file.seek(0)
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield RawRow(f"{path}:{number}", path.parent, _parse(line, path, number))


def _first_line(file: BinaryIO) -> bytes:
    for line in file:
        if line.strip():
            break
    else:
        line = b""
    file.seek(0)
    return line.removeprefix(b"\xef\xbb\xbf")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _whole(path: Path, data: bytes) -> list[Any] | None:
    """The rows of a file that is not JSON Lines; None where it is no JSON at all."""
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None
    decoder, values, place = json.JSONDecoder(), [], 0
    try:
        while place < len(text):
            value, place = decoder.raw_decode(text, place)
            values.append(value)
            while place < len(text) and text[place] in " \t\r\n,":
                place += 1
    except (ValueError, RecursionError):
        return None
    if len(values) != 1:
        return values
    (value,) = values
    if isinstance(value, list):
        return value
    return _wrapped(value) or [value]


def _wrapped(value: Any) -> list[Any]:
    """The rows of an object whose one list they are; none of one that is a row itself."""
    if not isinstance(value, dict) or ROW_COLUMNS & value.keys():
        return []
    lists = [
        held for held in value.values()
        if isinstance(held, list) and held and all(isinstance(row, dict) for row in held)
        and not any({"role", "from", "type"} & row.keys() for row in held)
    ]  # fmt: skip
    return lists[0] if len(lists) == 1 else []


def _is_wrapper(line: bytes) -> bool:
    return bool(_wrapped(json.loads(line)))


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any] | DataError:
    where = f"{path}:{number}"
    try:
        return _object(json.loads(line.decode("utf-8")), path, number, "")
    except UnicodeDecodeError as error:
        return DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line); convert it")
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not JSON ({error})")


def _object(row: Any, path: Path, number: int, word: str) -> dict[str, Any] | DataError:
    if isinstance(row, dict):
        return row
    where = f"{path}:{word} {number}" if word else f"{path}:{number}"
    return DataError(f"{where}: a {type(row).__name__}, not an object")


def _read_csv(path: Path, file: BinaryIO, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)

    def lines() -> Iterator[str]:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8; convert the file") from error

    reader = csv.DictReader(lines(), delimiter=delimiter, strict=True, restval=_MISSING)
    names = _unique(path, reader.fieldnames or [])
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error
        where = f"{path}:{reader.line_num}"
        if None in row:
            found = len(row) - 1 + len(row[None])  # type: ignore[call-overload]
            yield RawRow(where, path.parent, DataError(
                f"{where}: {found} cells under {len(row) - 1} columns; quote cells that hold a "
                f"{delimiter!r}"
            ))  # fmt: skip
            continue
        if _MISSING in row.values():
            found = sum(cell != _MISSING for cell in row.values())
            yield RawRow(where, path.parent, DataError(
                f"{where}: {found} cells under {len(names)} columns"
            ))  # fmt: skip
            continue
        yield RawRow(where, path.parent, {key: cell or None for key, cell in row.items()})


_MISSING = "\0missing"


def _unique(path: Path, names: Any) -> list[str]:
    """Raises DataError for columns of one name."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"{path}: two columns are called {twice[0]!r}")
    return list(names)


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:  # a row group after the other, never all of it
            _unique(path, file.schema_arrow.names)
            classes = _class_names(file.schema_arrow.metadata)
            short = {field.name for field in file.schema_arrow if _has_short_floats(field.type)}
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    for name in short:
                        row[name] = _shortest(row[name], batch.schema.field(name).type)
                    for name, names in classes.items():
                        if isinstance(row.get(name), int):
                            row[name] = names[row[name]]
                    yield RawRow(f"{path}:row {number}", path.parent, row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file, or a broken one ({error})") from error


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of classes that ``datasets`` writes as numbers, by column."""
    try:
        about = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        features = about.get("info", {}).get("features", {})
        return {
            name: feature["names"]
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (ValueError, AttributeError, KeyError):
        return {}


def _has_short_floats(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_float32(kind) or types.is_float16(kind):
        return True
    if types.is_nested(kind):
        return any(_has_short_floats(kind.field(i).type) for i in range(kind.num_fields))
    return False


def _shortest(value: Any, kind: Any) -> Any:
    """The value with each 16- and 32-bit float as the shortest decimal that means it: 0.1, not
    0.10000000149011612."""
    import pyarrow.types as types

    if value is None:
        return None
    if types.is_float32(kind):
        return float(str(np.float32(value)))
    if types.is_float16(kind):
        return float(str(np.float16(value)))
    if types.is_struct(kind):
        return {name: _shortest(held, kind.field(name).type) for name, held in value.items()}
    if types.is_nested(kind) and hasattr(kind, "value_type") and isinstance(value, list):
        return [_shortest(held, kind.value_type) for held in value]
    return value


def _read_dataset(path: str, split: str) -> Iterator[RawRow]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path!r} is no file that can be read ({', '.join(KINDS)}); to read it as a dataset, "
            'install the extra "datasets"'
        ) from error
    try:
        if (Path(path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)[split]
        elif (Path(path) / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, split=split)
    except Exception as error:  # the package raises many types, all meaning "not to be had"
        raise DataError(
            f"{path}, split {split!r}: neither a file that can be read ({', '.join(KINDS)}) nor a "
            f"data set that can be loaded ({type(error).__name__}: {error})"
        ) from error
    # Images stay the files they are: decoding and encoding again would change their digests.
    for name, kind in loaded.features.items():
        if isinstance(kind, datasets.Image):
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            loaded = loaded.cast_column(name, datasets.List(datasets.Image(decode=False)))
    folder = Path(path) if Path(path).is_dir() else Path()
    classes = {n: k for n, k in loaded.features.items() if isinstance(k, datasets.ClassLabel)}
    schema = loaded.features.arrow_schema
    short = {field.name for field in schema if _has_short_floats(field.type)}
    for number, row in enumerate(loaded, 1):
        for name, kind in classes.items():
            row[name] = kind.int2str(row[name]) if row[name] is not None else None
        for name in short:
            row[name] = _shortest(row[name], schema.field(name).type)
        yield RawRow(f"{path}[{split}]:row {number}", folder, row)
