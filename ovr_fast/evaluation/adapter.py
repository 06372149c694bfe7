"""A benchmark as a TOML file: which columns of whose files are questions, and how they are scored.

The files are the user's own copies of the official ones; nothing is downloaded. Shipped adapters
are in ``adapters/``; one's own set takes ten lines.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from ovr_fast.errors import OVRFastError

SHIPPED = Path(__file__).parent / "adapters"

Kind = Literal["choice", "number", "math", "exact", "text", "list", "yes_no", "judged", "graded"]
"""How an answer is compared. "exact": what is not equal is wrong; "text": it may be the same in
other words, so a judge decides; "judged": a judge alone, "graded": by parts of a point."""
Aggregate = Literal["mean", "worst_of", "wemath", "f1", "pairs", "hallusion"]


class EvaluationError(OVRFastError, ValueError):
    """Files, records or settings of an evaluation that do not fit; says what to do."""


class Adapter(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How rows become questions. Columns are named; "a.b" is inside a column, "{a} {b}" a text of
    several. What is as by default is not part of a protocol's hash."""

    name: str
    files: tuple[str, ...]
    """Patterns under ``--data``, of which the first that files match is read, by name: they are
    the same rows in other layouts. "{1..10}" stands for ten patterns, all of which are read."""
    rows: int
    """That the files must hold, once filtered; 0: any number (a set of one's own)."""
    id: str = ""
    """Column of a question's name; "": its number."""
    question: str = "question"
    """"": it stands in the picture."""
    question_prefix: str = ""
    pictures: tuple[str, ...] = ()
    """Columns; all that a row has are shown, in this order."""
    one_of: tuple[str, ...] = ()
    """Columns of which the first that a row has is the picture."""
    picture_rows: str = ""
    """Column whose values name rows: a picture that is such a name is that row's picture."""
    marks: str = ""
    """Pattern of marks that are removed from the question (where one picture stands for all)."""
    bound_marks: str = ""
    """Pattern of marks whose number names the picture column that belongs there."""
    options: str | tuple[str, ...] = ()
    """A column with a list, a mapping or a text "A. x; B. y"; or a column an option."""
    show_options: bool = True
    """Whether the prompt lists them; else they stand in its text or picture."""
    shuffled: bool = False
    """Options are put into an order that follows from the question's name."""
    answer: str = "answer"
    answers: dict[str, str] = {}
    """What the column's values mean, where they are codes."""
    answer_is: Literal["letter", "text"] = "letter"
    """Of a choice: a letter that is an option's text too ("A. B; B. C", answer "B") means this."""
    kind: Kind = "math"
    kind_column: str = ""
    kinds: dict[str, Kind] = {}
    """What the column's values mean; those not named are ``kind``."""
    choice_where_options: bool = False
    """A row with options is a choice, whatever ``kind`` says."""
    decimals: int = -1
    """A number counts as equal when both are rounded to these; -1: as the gold answer."""
    decimals_column: str = ""
    tolerance: float = 0.0
    where: dict[str, str | int | float | bool | tuple[str, ...]] = {}
    """Rows with these values, or one of several, alone."""
    skip_without: tuple[str, ...] = ()
    """Rows without a value in one of these columns do not count."""
    cluster: str = ""
    """Column (or text of several) of what belongs together; "": each question alone."""
    cluster_modulo: int = 0
    """The cluster is the column's remainder by this: a rotation of a question has its number plus
    a multiple."""
    groups: tuple[str, ...] = ()
    """Columns whose values get a score of their own."""
    groups_separator: str = ""
    """A value is several, with this between them."""
    variants: str = ""
    """Column, or "file" for the number of the file: which of a cluster's questions it is."""
    aggregate: Aggregate = "mean"
    instruction: str | None = None
    """Ends the prompt; None: the protocol's."""
    official_question: str = ""
    """Column of the official prompt, for ``--style official``."""
    rubric: str = ""
    """Column of what the official judge is asked."""
    rubric_mark: str = ""
    """What the response takes the place of there."""
    samples: int = 1
    max_tokens: int = 49_152
    licence: str = ""
    source: str = ""
    """Where the official files are."""


def load_adapter(name: str) -> Adapter:
    """A shipped adapter by its name, or a TOML file.

    Raises:
        EvaluationError: there is none, or it holds an unknown key or a wrong value; names it.
    """
    path = Path(name) if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    if not path.is_file():
        raise EvaluationError(
            f"no benchmark {name!r}; shipped are {', '.join(shipped())}, or name a TOML file"
        )
    try:
        adapter = msgspec.toml.decode(path.read_bytes(), type=Adapter)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: {error}") from error
    if not adapter.files:
        raise EvaluationError(f"{path}: files names none")
    return adapter


def adapter_of(manifest: dict[str, Any]) -> Adapter:
    """The adapter that responses were made with.

    Raises:
        EvaluationError: the manifest holds none.
    """
    try:
        return msgspec.convert(manifest.get("adapter"), Adapter)
    except msgspec.ValidationError as error:
        raise EvaluationError(f"a manifest without an adapter ({error})") from error


def shipped() -> list[str]:
    """Names of the adapters in the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def is_nothing(value: Any) -> bool:
    """Whether a cell is empty, also as pandas writes it: a float that is no number, or "nan"."""
    if isinstance(value, np.ndarray):
        return value.size == 0
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (
        isinstance(value, str | list | dict | tuple) and (len(value) == 0 or value == "nan")
    )


def column(row: dict[str, Any], name: str) -> Any:
    """A column, "a.b" inside one, or "{a} {b}" as a text; None where it is not there."""
    if "{" in name:
        parts = name.split("{")
        text = parts[0]
        for part in parts[1:]:
            key, _, rest = part.partition("}")
            value = column(row, key)
            text += ("" if is_nothing(value) else str(value)) + rest
        return text.strip()
    if name in row:
        return row[name]
    inner: Any = row
    for key in name.split("."):
        if not isinstance(inner, dict) or key not in inner:
            return None
        inner = inner[key]
    return inner
