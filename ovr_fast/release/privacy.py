"""What may not leave the machine: absolute paths, and names of hosts and users."""

from __future__ import annotations

import contextlib
import getpass
import re
import socket
from collections.abc import Iterator
from pathlib import Path

_BEFORE = r"(?<![\w:/.<>~-])"
"""Neither a URL's path, a fraction nor a closing tag begins with a slash after one of these."""
_PATH = re.compile(_BEFORE + r"/(?:[\w.@+-]+/)+([\w.@+-]*)")
_QUOTED = re.compile(r"""(["'])/(?:[^"'/\n]+/)+([^"'/\n]*)\1""")
"""A path with spaces in it ends with its quotation mark."""
_HOME = re.compile(_BEFORE + r"/(?:home|Users)/[^/\s\"']+|(?:\b[A-Z]:)\\+Users\\+[^\\\s\"']+")
_MORE = (
    r"\bfile:///", r"\b[A-Z]:\\+\w", r"://[^/\s\"'@]+:[^/\s\"'@]+@",
    r"\b[\w.+-]+@[\w-]+\.[\w.]{2,}", r"\b(?:sk|hf|ghp)[-_]\w{8,}",
)  # fmt: skip
"""Files and disks, passwords in addresses, mail, keys."""
COMMON = {"localhost", "root", "user", "ubuntu", "admin", "main", "model", "test", "work", "data",
          "vllm", "torch", "train", "node", "host", "home", "runs"}  # fmt: skip
"""Words that are no name of anybody."""
TEXT = (".json", ".toml", ".md", ".html", ".yaml", ".csv", ".jinja", ".txt", "NOTICE")
OWN = {"tokenizer.json", "vocab.json", "merges.txt"}
"""A tokenizer's words are anything."""


def names() -> list[str]:
    """Of this machine and of who uses it."""
    found = {socket.gethostname()}
    with contextlib.suppress(KeyError, OSError):  # no entry for this user
        found.add(getpass.getuser())
    return sorted(name for name in found if len(name) > 3 and name.lower() not in COMMON)


def scrubbed(text: str) -> str:
    """Absolute paths become their last part, of a home folder "HOME"; paths under this folder lose
    what is before."""
    here = str(Path.cwd()).rstrip("/")
    if here:
        text = re.sub(_BEFORE + re.escape(here) + "/", "", text)
    text = _HOME.sub("/HOME", text)
    text = _QUOTED.sub(lambda match: f"{match[1]}{_last(match[0].strip(match[1]))}{match[1]}", text)
    text = _PATH.sub(lambda match: _last(match[0]), text).replace("/HOME", "HOME")
    for name in names():
        text = re.sub(rf"\b{re.escape(name)}\b", "HOST", text)
    return text


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def leaks(folder: Path) -> Iterator[str]:
    """Each place of a text file that names a path of this machine, its host or its user, a mail
    address or a key.

    Args:
        folder: to be published.
    """
    private = {str(Path.cwd()), str(Path.home())} - {"/", "/root"}
    places = [_BEFORE + re.escape(place) + r"\b" for place in sorted(private)]
    words = [rf"\b{re.escape(name)}\b" for name in names()]
    homes = _BEFORE + r"/(?:home|root|Users|tmp|mnt|data|scratch)/[\w.-]+"
    pattern = re.compile("|".join([*places, *words, homes, *_MORE]))
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in OWN:
            continue
        for number, line in enumerate(_lines(path), 1):
            if match := pattern.search(line):
                yield f"{path.relative_to(folder)}:{number}: {match[0]}"


def _lines(path: Path) -> list[str]:
    """Of a text; of a table its rows and the names of its columns."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        return [" ".join(table.column_names), *map(str, table.to_pylist())]
    return path.read_text(errors="replace").splitlines() if path.name.endswith(TEXT) else []
