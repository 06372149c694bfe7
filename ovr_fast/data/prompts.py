"""Prompts out of rows, mixed by weight. One way for the check, both stages and evaluation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ovr_fast.config import DataSource
from ovr_fast.data.errors import AnswerColumnError, DataError, naming
from ovr_fast.data.files import RawRow, read_rows
from ovr_fast.data.formats import RowFormat
from ovr_fast.data.images import read_image
from ovr_fast.data.messages import Conversation, checked, read_conversation, text_of_response
from ovr_fast.grading.gold import AnswerError, clean_gold, is_marked, text_of
from ovr_fast.records import ImageFile, Prompt


@dataclass(slots=True)
class Reading:
    """What was found while a source was read."""

    source: DataSource
    format: RowFormat | None = None
    columns: set[str] = field(default_factory=set)  # of all rows
    rows: int = 0
    dropped: list[str] = field(default_factory=list)  # the messages of rows that were left out
    notes: Counter[str] = field(default_factory=Counter)  # of what was read in a way to know of
    images_dropped: bool = False  # whether a row went for an image, which may be mended

    def as_meta(self) -> dict[str, Any]:
        """What is kept of it: see ``described``."""
        form = self.format.describe(self.columns) if self.format is not None else ""
        notes = [f"{count:,} {what}" for what, count in self.notes.items()]
        return {
            "rows": self.rows,
            "format": form,
            "notes": notes,
            "dropped": self.dropped,
            "images_dropped": self.images_dropped,
        }

    def describe(self) -> str:
        """One line for the log."""
        return described(self.source.path, self.as_meta())


def described(path: str, meta: dict[str, Any]) -> str:
    """One line about a source that was read, now or by an earlier start."""
    parts = [f"{path}: {meta['rows']:,} rows", meta["format"], *meta["notes"]]
    if dropped := meta["dropped"]:
        parts.append(f"{len(dropped):,} dropped (dropped_rows.txt), the first: {dropped[0]}")
    return "; ".join(filter(None, parts))


@dataclass(frozen=True, slots=True)
class ReadRow:
    """A row as a prompt, or as the error that says why it cannot be one."""

    where: str
    prompt: Prompt | None
    error: DataError | None
    tokens: int = 0  # of the prompt or demonstration; 0 where no template counts them
    trained: int = 0  # of those


Measure = Callable[[Prompt], tuple[int, int]]
"""Tokens of a prompt or demonstration, and how many of them are trained; raises a DataError for one
that the model cannot take."""


def iterate(
    source: DataSource, *, need: str | None, measure: Measure | None, reading: Reading
) -> Iterator[ReadRow]:
    """Each row of a source, in the file's order, lazily.

    Args:
        need: "answer" or "response", a field that every row must have; "prompt", whose answers are
            not looked at; None, where an answer that is there must be a good one.
        measure: counts a prompt's tokens, and so finds what the model cannot take.
        reading: is filled on the way.

    Raises:
        DataError: the file cannot be read.
    """
    for raw in read_rows(source.path, split=source.split):
        reading.rows += 1
        yield read_row(raw, source, need=need, measure=measure, reading=reading)


def read_row(
    raw: RawRow,
    source: DataSource,
    *,
    need: str | None,
    measure: Measure | None,
    reading: Reading,
) -> ReadRow:
    """One row of ``iterate``. The first with the columns of some format decides how all are read;
    one before it is a bad row."""
    if isinstance(raw.row, DataError):
        return ReadRow(raw.where, None, raw.row)
    if reading.format is None:
        try:
            reading.format = RowFormat(source, raw.row, raw.where)
        except DataError as error:
            return ReadRow(raw.where, None, error)
    reading.columns.update(map(str, raw.row))
    try:
        with naming(raw.where):
            prompt = parse_row(raw, source=source, need=need, reading=reading)
            tokens, trained = measure(prompt) if measure else (0, 0)
    except DataError as error:
        return ReadRow(raw.where, None, error)
    return ReadRow(raw.where, prompt, None, tokens, trained)


def parse_row(raw: RawRow, *, source: DataSource, need: str | None, reading: Reading) -> Prompt:
    """One row as a prompt, its images loaded and checked.

    Raises:
        ImageError: a missing or broken image.
        DataError: anything else that is wrong.
    """
    assert isinstance(raw.row, dict)
    assert reading.format is not None
    where = raw.where
    found = reading.format.fields(raw.row, where)
    conversation = read_conversation(found.prompt, found.images, system=found.system)
    messages, response = list(conversation.messages), None
    try:
        if found.response is not None:
            response = text_of_response(found.response)
        elif reading.format.ends_with_response and messages[-1]["role"] == "assistant":
            response = text_of_response(messages.pop())
    except DataError as error:
        raise DataError(f"{where}: response, column {found.response_column!r}: {error}") from error
    if all(message["role"] != "user" for message in messages):
        raise DataError(f"{where}: the prompt has no turn of the user")
    if next(m["role"] for m in messages if m["role"] != "system") != "user":
        raise DataError(f"{where}: the conversation begins with the assistant")
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt's last turn is the assistant's")
    answer = None
    if need in ("answer", None):  # the cold start has no use for one
        try:
            answer = text_of(found.answer, found.answer_column)
            solution = answer if found.answer_column.endswith("solution") else None
            if solution is not None and len(solution.split()) > 5 and not is_marked(solution):
                raise AnswerError(
                    f"column {found.answer_column!r} holds a solution without a box, a tag or "
                    "####, and no answer stands elsewhere"
                )
            answer = None if answer is None else clean_gold(checked(answer))
        except (AnswerError, DataError) as error:
            raise AnswerColumnError(f"{where}: {error}") from error
    if need == "answer" and answer is None:
        column = found.answer_column or source.answer
        raise AnswerColumnError(f"{where}: no answer in column {column!r}; set the source's answer")
    if need == "response":
        if response is None:
            column = found.response_column or source.response
            raise DataError(f"{where}: no response in column {column!r}; set the source's response")
        if not response.strip():
            raise DataError(f"{where}: the response is empty")
        if conversation.images:
            raise DataError(f"{where}: the cold start is text only, and this row has an image")
    identity = raw.row.get("id")
    return Prompt(
        id=where if identity is None else str(identity),
        data_source=source.name or Path(source.path).stem,
        messages=tuple(messages),
        images=load_images(conversation, raw, source, reading.notes),
        answer=answer,
        response=response,
        columns={name: further_column(raw, name) for name in source.columns},
    )


def further_column(raw: RawRow, name: str) -> Any:
    """What a row has there, as JSON would have it; None where it has nothing.

    Raises:
        DataError: it cannot be written as JSON, such as an image.
    """
    value: Any = raw.row
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    try:
        return json.loads(json.dumps(value, default=lambda item: item.tolist()))
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{raw.where}: column {name!r} is no number, text or list of them") from (
            error
        )


def load_images(
    conversation: Conversation, raw: RawRow, source: DataSource, notes: Counter[str]
) -> tuple[ImageFile, ...]:
    """A conversation's images, in the order of their places."""
    folder = Path(source.image_folder) if source.image_folder else raw.folder
    return tuple(
        read_image(
            item,
            folder=folder,
            where=f"{raw.where}, image {i}",
            max_pixels=source.max_image_pixels,
            notes=notes,
        )
        for i, item in enumerate(conversation.images)
    )


def read(
    source: DataSource,
    *,
    need: str | None,
    measure: Measure | None = None,
    limit: int | None = None,
) -> tuple[list[Prompt], list[int], Reading]:
    """All prompts of a source, in memory, the tokens of each, and what was found on the way.

    Args:
        need: "answer" or "response", a field that every row must have; None for neither.
        measure: counts a prompt's tokens.
        limit: stop after this many prompts.

    Raises:
        DataError: see ``check_reading``; or a row cannot be used (names file and line) and
            ``on_bad_row`` says stop.
    """
    reading = Reading(source)
    prompts, tokens = [], []
    for row in iterate(source, need=need, measure=measure, reading=reading):
        if row.error is not None:
            if source.on_bad_row == "stop":
                raise row.error
            reading.dropped.append(str(row.error))
        elif row.prompt is not None:
            prompts.append(row.prompt)
            tokens.append(row.tokens)
            if len(prompts) == limit:
                break
    check_reading(reading, len(prompts))
    return prompts, tokens, reading


def check_reading(reading: Reading, prompts: int) -> None:
    """Whether a source that was read can be used.

    Raises:
        DataError: it is empty, too many of its rows cannot be used, or a column that the settings
            name is in none.
    """
    source = reading.source
    if not reading.rows:
        raise DataError(f"{source.path} holds no rows")
    if len(reading.dropped) > source.max_bad_share * reading.rows or not prompts:
        raise DataError(
            f"{source.path}: {len(reading.dropped):,} of {reading.rows:,} rows cannot be used, "
            f"over max_bad_share={source.max_bad_share}; the first: {reading.dropped[0]}"
        )
    check_columns(reading)


def check_columns(reading: Reading) -> None:
    """Whether some row has each column that the settings name; raises DataError."""
    source = reading.source
    if reading.format is not None:
        for name in sorted({*reading.format.explicit, *source.columns}):
            if name.split(".")[0] not in reading.columns:
                raise DataError(
                    f"{source.path}: no row has the column {name!r} that the source names (they "
                    f"have {sorted(reading.columns)})"
                )


def read_source(source: DataSource, *, need: str | None, limit: int | None = None) -> list[Prompt]:
    """The prompts of ``read`` alone."""
    return read(source, need=need, limit=limit)[0]


class Pool(Protocol):
    """A source's prompts: a list, or ``StoredPrompts``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Prompt: ...

    def size(self, index: int, /) -> tuple[int, int]: ...


class Mixture:
    """Several data sources, mixed by weight into one endless seeded stream.

    Each source is walked in a shuffled order of its own, reshuffled after every pass, so the
    stream is a function of the seed and can be continued from any position.
    """

    def __init__(self, pools: List[Pool], weights: list[float], *, seed: int) -> None:
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
        return [self.pools[pool][place] for pool, place in self.places(count)]

    def places(self, count: int) -> list[tuple[int, int]]:
        """The pool, and the place in it, of each of the next ``count`` prompts."""
        return [self._next() for _ in range(count)]

    def _next(self) -> tuple[int, int]:
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
        return pick, int(self._orders[key][place])

    def state(self) -> dict:
        """What ``restore`` needs to go on from here."""
        sizes = [len(pool) for pool in self.pools]
        return {"drawn": list(self.drawn), "position": self.position, "sizes": sizes}

    def restore(self, state: dict) -> None:
        """Go on from a saved position.

        Raises:
            DataError: the sources have other numbers of prompts than when it was saved.
        """
        sizes = [len(pool) for pool in self.pools]
        if state.get("sizes", sizes) != sizes:
            raise DataError(
                f"the sources have {sizes} prompts, and had {state['sizes']} when the checkpoint "
                "was saved: the data have changed; restore them, or start a new run"
            )
        self.drawn, self.position = list(state["drawn"]), state["position"]
