"""Which columns of a file are the prompt, the images, the answer and the response.

Formats are named after the projects whose files have them. A dotted name is a column of a record
(``reward_model.ground_truth``).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ovr_fast.config import DataSource
from ovr_fast.data.errors import DataError

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Columns of a kind of file. Of several for one purpose the first that holds something counts;
    those of the prompt are joined by blank lines."""

    needs: Names  # columns by which it is known
    prompt: Names
    images: Names = ("images", "image")
    answer: Names = ("answer",)
    response: Names = ("response",)
    system: Names = ("system",)
    described: str = ""


FORMATS: dict[str, Format] = {
    "sharegpt": Format(
        needs=("conversations",),
        prompt=("conversations",),
        answer=("answer", "ground_truth"),
        response=(),
        described="LLaVA, ShareGPT: turns with from and value; the last of gpt is the response",
    ),
    "verl": Format(
        needs=("prompt", "reward_model"),
        prompt=("prompt",),
        answer=("reward_model.ground_truth",),
        response=("response", "extra_info.response"),
        described="verl: messages, nested answer, list of {bytes, path}",
    ),
    "messages": Format(
        needs=("messages",),
        prompt=("messages",),
        answer=("answer", "ground_truth", "reward_model.ground_truth", "solution"),
        response=(),
        described="ms-swift, OpenR1, OpenAI: chat messages; the assistant's last is the response",
    ),
    "trl": Format(
        needs=("prompt", "completion"),
        prompt=("prompt",),
        answer=("answer", "ground_truth", "solution"),
        response=("completion",),
        described="TRL: prompt and completion, text or messages",
    ),
    "alpaca": Format(
        needs=("instruction", "output"),
        prompt=("instruction", "input"),
        response=("output",),
        described="Alpaca: instruction, input, output",
    ),
    "easyr1": Format(
        needs=("problem",),
        prompt=("problem",),
        answer=("answer", "ground_truth", "solution"),
        response=("response", "generation", "solution"),
        described="EasyR1, MATH, OpenR1 without messages: problem, answer or solution, images",
    ),
    "question": Format(
        needs=("question",),
        prompt=("question",),
        answer=("answer", "ground_truth", "solution"),
        response=("response", "solution"),
        described="GSM8K and many benchmarks: question, answer",
    ),
    "imagefolder": Format(
        needs=("file_name", "prompt"),
        prompt=("prompt",),
        images=("file_name",),
        described="a folder of images with a metadata file",
    ),
}
"""In the order in which ``auto`` tries them."""

_MEDIA = re.compile(
    r"(image|img|picture|photo|video|audio)s?(_?\d+|_?(path|url|file|bytes|list))?|tools|functions|"
    r"file_name"
)
"""Columns that change a prompt's meaning where nobody reads them."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_CHOICES = ("options", "choices")
REFUSED = {
    "video": "videos", "videos": "videos", "audio": "audio", "audios": "audio",
    "tools": "tool calls", "functions": "tool calls",
}  # fmt: skip
DEFAULTS = DataSource()


@dataclass(frozen=True, slots=True)
class Fields:
    """A row's values by purpose, as the file has them."""

    prompt: Any
    images: Any
    answer: Any
    response: Any
    system: Any
    answer_column: str
    response_column: str


class RowFormat:
    """How a source's rows are read.

    Args:
        source: its settings.
        columns: of its first row.

    Raises:
        DataError: no format has these columns.
    """

    def __init__(self, source: DataSource, columns: Iterable[str], where: str) -> None:
        have = set(columns)
        explicit = {
            name for name in ("prompt", "images", "answer", "response")
            if getattr(source, name) != getattr(DEFAULTS, name)
        }  # fmt: skip
        self.name, self.why = source.format, "as set"
        if source.format == "auto":
            self.name, self.why = _recognise(source, have, explicit, where)
        if self.name == "columns":
            images = (source.images,) if "images" in explicit else ("images", "image")
            chosen = Format(
                needs=(source.prompt,), prompt=(source.prompt,), images=images,
                answer=(source.answer,), response=(source.response,),
            )  # fmt: skip
        else:
            chosen = FORMATS[self.name]
            if missing := [name for name in chosen.needs if name not in have]:
                raise DataError(
                    f"{where}: no column {missing[0]!r}, which format={self.name!r} needs (it has "
                    f"{sorted(have)})"
                )
        self.format = chosen
        self.ends_with_response = not chosen.response  # the assistant's last turn is it
        self.explicit = {getattr(source, name) for name in explicit}
        self.read = {
            name.split(".")[0]
            for names in (chosen.prompt, chosen.images, chosen.answer, chosen.response,
                          chosen.system, ("id",))
            for name in names
        }  # fmt: skip

    def fields(self, row: dict[str, Any], where: str) -> Fields:
        """The values of a row.

        Raises:
            DataError: no prompt, or a column that nobody reads holds images, videos, audio, tools.
        """
        chosen = self.format
        prompts = [(name, dotted(row, name)) for name in chosen.prompt]
        if all(value is None for _, value in prompts):
            raise DataError(
                f"{where}: no column {chosen.prompt[0]!r} (it has {sorted(map(str, row))}); set "
                "the source's prompt, or its format"
            )
        for name in row:
            if name in self.read or not _MEDIA.fullmatch(str(name)) or _empty(row[name]):
                continue
            if name != "file_name" or str(row[name]).lower().endswith(_PICTURES):
                refused = REFUSED.get(str(name))
                raise DataError(
                    f"{where}: column {name!r} holds {refused}, which this project does not train"
                    if refused
                    else f"{where}: column {name!r} holds something and is not read; set the "
                    f"source's images={name!r}, or remove the column"
                )
        twice = [name for name in chosen.images if not _empty(dotted(row, name))]
        if len(twice) > 1:
            raise DataError(f"{where}: images in columns {twice[0]!r} and {twice[1]!r}; leave one")
        held = [value for _, value in prompts if not _empty(value)]
        joined = len(held) > 1 and all(isinstance(value, str) for value in held)
        _check_options(row, self.read, held, where)
        answer_column, answer = _first(row, chosen.answer)
        response_column, response = _first(row, chosen.response)
        return Fields(
            prompt="\n\n".join(held) if joined else held[0] if held else prompts[0][1],
            images=_first(row, chosen.images)[1],
            answer=answer,
            response=response,
            system=_first(row, chosen.system)[1],
            answer_column=answer_column,
            response_column=response_column,
        )

    def describe(self, columns: Iterable[str]) -> str:
        """What is read, and what is not."""
        have = set(columns)
        read, left = sorted(have & self.read), sorted(have - self.read)
        text = f"format {self.name} ({self.why}): reads {', '.join(read)}"
        return text + (f"; not read: {', '.join(left)}" if left else "")


def _recognise(
    source: DataSource, have: set[str], explicit: set[str], where: str
) -> tuple[str, str]:
    """The name of the format of a source, and why it is that one."""
    if explicit:
        return "columns", f"columns are set: {', '.join(sorted(explicit))}"
    for name, known in FORMATS.items():
        if have.issuperset(known.needs):
            return name, f"it has {' and '.join(known.needs)}"
    if {"chosen", "rejected"} <= have:
        raise DataError(
            f"{where}: columns chosen and rejected: preference pairs, which this recipe does not "
            "train; set the source's prompt and response=chosen for the cold start"
        )
    if source.prompt.split(".")[0] in have:
        return "columns", f"it has {source.prompt}"
    raise DataError(
        f"{where}: no column {source.prompt!r} (it has {sorted(map(str, have))}); set the source's "
        f"prompt, or its format: {', '.join(FORMATS)}"
    )


def _check_options(row: dict[str, Any], read: set[str], held: list[Any], where: str) -> None:
    """Whether choices that stand in a column of their own stand in the prompt too.

    Raises:
        DataError: they do not: nobody could answer with the right letter.
    """
    for name in _CHOICES:
        options = row.get(name)
        if name in read or _empty(options):
            continue
        if isinstance(options, str) and options.lstrip()[:1] in "[{":
            with contextlib.suppress(ValueError, RecursionError):
                options = json.loads(options)
        found = list(options.values()) if isinstance(options, dict) else options
        if not isinstance(found, list | tuple):
            continue
        prompt = " ".join(str(value) for value in held)
        if missing := [o for o in found if isinstance(o, str) and o.strip() not in prompt]:
            raise DataError(
                f"{where}: column {name!r} holds choices that the prompt does not show "
                f"({missing[0]!r}); write them into the prompt, or remove the column"
            )


def dotted(row: Any, name: str) -> Any:
    """A column, or a record's: ``reward_model.ground_truth``; None where there is none. A record
    may be written as JSON text."""
    if isinstance(row, dict) and name in row:
        return row[name]
    first, _, rest = name.partition(".")
    held = row.get(first) if isinstance(row, dict) else None
    if not rest:
        return held
    if isinstance(held, str) and held.lstrip()[:1] == "{":
        try:
            held = json.loads(held)
        except (ValueError, RecursionError):
            return None
    return dotted(held, rest)


def _first(row: dict[str, Any], names: Names) -> tuple[str, Any]:
    """The first of the columns that holds something, with its name."""
    for name in names:
        if not _empty(value := dotted(row, name)):
            return name, value
    for name in names:  # an empty text is no absent one
        if (value := dotted(row, name)) is not None:
            return name, value
    return (names[0] if names else ""), None


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | tuple | dict) and not value)
