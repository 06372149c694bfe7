"""A checkpoint is what was saved: each file's checksum, made while it is written.

``checksums.json`` is written last. It has the run's identity and the step, so that files or whole
checkpoints of another run are not taken for this one's, and a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import IOBase
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

NAME = "checksums.json"

_THREADS = 4
_BLOCK_BYTES = 16 * 2**20


class HashingFileSystem(FileSystem):
    """Writes as its base does, and knows the SHA-256 of what went into each file."""

    def __init__(self) -> None:
        super().__init__()
        self.checksums: dict[str, str] = {}  # by file name

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IOBase]:
        """See ``FileSystem``."""
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            hashing = _HashingStream(stream)
            yield hashing  # type: ignore[misc]
            self.checksums[Path(path).name] = hashing.digest.hexdigest()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """See ``FileSystem``."""
        super().rename(path, new_path)
        if (digest := self.checksums.pop(Path(path).name, None)) is not None:
            self.checksums[Path(new_path).name] = digest


class _HashingStream:
    def __init__(self, stream: IOBase) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._stream.write(data)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_checksums(folder: Path, checksums: dict[str, str], about: dict[str, Any]) -> None:
    """The last file of a checkpoint.

    Args:
        folder: of the checkpoint.
        checksums: SHA-256 by file name.
        about: identity of the run, recipe stage and step.
    """
    content: dict[str, Any] = {**about, "files": dict(sorted(checksums.items()))}
    content["sha256"] = _of_text(content)
    with open(folder / NAME, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path, about: dict[str, Any], *, share: int = 0, of: int = 1) -> str:
    """What in a checkpoint is not what was saved; "" if nothing.

    Args:
        about: what it must be: identity of the run, recipe stage and step.
        share: of the files are read this one in ``of``, in several threads.
        of: readers that share the work.
    """
    try:
        content = json.loads((folder / NAME).read_text())
        said = content.pop("sha256")
        files = sorted(content["files"].items())
    except FileNotFoundError:
        return f"{NAME} is not there"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read ({error})"
    if said != _of_text(content):
        return f"{NAME} has changed since it was written"
    for key, value in about.items():
        if content.get(key) != value:
            return f"it is of {key} {content.get(key)!r}, not {value!r}"
    present = {path.name for path in folder.iterdir()} - {NAME}
    if odd := sorted(present ^ {name for name, _ in files}):
        return f"{odd[0]} is {'not its own' if odd[0] in present else 'missing'}"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: _differs(folder / item[0], item[1]), files[share::of])
        return next(filter(None, found), "")


def checksums_of(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 by file name; "" for one that cannot be read."""

    def checksum(path: Path) -> tuple[str, str]:
        try:
            return path.name, _of_file(path)
        except OSError:
            return path.name, ""

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(pool.map(checksum, paths))


def _differs(path: Path, expected: str) -> str:
    try:
        found = _of_file(path)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return "" if found == expected else f"{path.name} has changed since it was written"


def _of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _of_text(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
