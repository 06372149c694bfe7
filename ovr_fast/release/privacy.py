"""What may not leave the machine: absolute paths, and names of hosts and users."""

from __future__ import annotations

import contextlib
import getpass
import re
import socket
from collections.abc import Iterator
from pathlib import Path

_PATH = re.compile(r"(?<![\w:/.<>~-])/(?:[\w.@+-]+/)+([\w.@+-]*)")
"""Two parts at least, so that neither a fraction nor a closing tag is one."""
COMMON = {"localhost", "root", "user", "ubuntu", "admin", "main", "model", "test"}
"""Words that are no name of anybody."""
TEXT = (".json", ".toml", ".md", ".html", ".yaml", ".csv", ".jinja", ".txt", "NOTICE", "LICENSE")


def names() -> list[str]:
    """Of this machine and of who uses it."""
    found = {socket.gethostname()}
    with contextlib.suppress(KeyError, OSError):  # no entry for this user
        found.add(getpass.getuser())
    return sorted(name for name in found if len(name) > 3 and name.lower() not in COMMON)


def scrubbed(text: str) -> str:
    """Absolute paths become their last part; paths under this folder lose what is before."""
    here = str(Path.cwd()).rstrip("/") + "/"
    text = _PATH.sub(lambda match: match[1] or match[0].rstrip("/").rpartition("/")[2],
                     text.replace(here, ""))  # fmt: skip
    for name in names():
        text = re.sub(rf"\b{re.escape(name)}\b", "HOST", text)
    return text


def leaks(folder: Path, *, but: tuple[str, ...] = ()) -> Iterator[str]:
    """Each place of a text file that names a path of this machine, its host or its user.

    Args:
        folder: to be published.
        but: files that came as they are, such as a tokenizer's.
    """
    private = {str(Path.cwd()), str(Path.home())} - {"/", "/root"}
    places = [re.escape(place) + r"\b" for place in sorted(private)]
    words = [rf"\b{re.escape(name)}\b" for name in names()]
    pattern = re.compile("|".join([*places, *words, r"/(?:home|root|Users|tmp)/[\w.-]+"]))
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in but or not path.name.endswith(TEXT):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if match := pattern.search(line):
                yield f"{path.relative_to(folder)}:{number}: {match[0]}"
