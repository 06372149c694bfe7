"""The questions of a benchmark, out of the user's files."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ovr_fast.data.errors import DataError
from ovr_fast.data.files import RawRow, read_rows
from ovr_fast.data.images import MAX_PIXELS, read_image
from ovr_fast.evaluation.adapter import Adapter, EvaluationError, Kind, column, is_nothing
from ovr_fast.records import ImageFile

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPTION = re.compile(r"(?:^|[;\n])\s*\(?([A-J])\)?[.:)]\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One task of a benchmark."""

    id: str
    text: str  # as the model reads it, before options and instruction
    kind: Kind
    answer: str  # of a choice its letters, as "B" or "BD"
    options: tuple[str, ...] = ()  # in the order in which they are shown
    order: tuple[int, ...] = ()  # which of the file's options stands where
    images: tuple[ImageFile, ...] = ()
    numbers: tuple[int, ...] = ()  # of the images, as marks in text and options name them
    cluster: str = ""
    variant: str = ""
    groups: tuple[tuple[str, str], ...] = ()  # (column, value)
    decimals: int = -1
    tolerance: float = 0.0
    official: str = ""  # the official prompt, where the file has one
    rubric: str = ""  # what the official judge is asked, where the file has it
    rubric_mark: str = ""  # what the response takes the place of there
    row: int = -1  # its number among all rows of the files, from 0: those left out count


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """An adapter and the questions that it found."""

    adapter: Adapter
    questions: tuple[Question, ...]
    files: tuple[Path, ...]
    rows: int  # of the files, those left out included


def load_benchmark(adapter: Adapter, data: Path, *, limit: int = 0) -> Benchmark:
    """Every question of a benchmark, or the first ``limit``.

    Raises:
        EvaluationError: the files, a column, a picture or an option is not there, or there are
            other numbers of rows than the official files have.
    """
    files = _files(adapter, data)
    notes: Counter[str] = Counter()
    rows: list[tuple[int, RawRow]] = []
    numbers: list[int] = []
    total = 0
    for number, raw in _rows(adapter, files):
        if _counts(adapter, raw, not rows):
            rows.append((number, raw))
            numbers.append(total)
        total += 1
    count = len(rows)
    if adapter.rows and count != adapter.rows:
        raise EvaluationError(
            f"{adapter.name}: {count:,} rows in {', '.join(map(str, files))}; the official files "
            f"have {adapter.rows:,}. For a set of your own write an adapter with rows = 0"
        )
    others = {}
    if adapter.picture_rows:
        for _, raw in rows:
            assert isinstance(raw.row, dict)
            others[str(column(raw.row, adapter.picture_rows))] = raw.row
    wanted = _first_clusters(adapter, rows, limit)
    questions = [
        replace(_question(adapter, raw, file, place, notes, others), row=numbers[place - 1])
        for place, (file, raw) in enumerate(rows, 1)
        if wanted is None or _cluster(adapter, raw, place) in wanted
    ]
    if not questions:
        raise EvaluationError(f"{adapter.name}: no question in {', '.join(map(str, files))}")
    twice = [name for name, times in Counter(q.id for q in questions).items() if times > 1]
    if twice:
        raise EvaluationError(
            f"{adapter.name}: {len(twice):,} questions have the name of another, such as "
            f"{twice[0]!r}; name a column that tells them apart as id"
        )
    return Benchmark(adapter=adapter, questions=tuple(questions), files=tuple(files), rows=total)


def _cluster(adapter: Adapter, raw: RawRow, place: int) -> str:
    assert isinstance(raw.row, dict)
    return _named_cluster(adapter, raw.row, raw.where) if adapter.cluster else str(place)


def _named_cluster(adapter: Adapter, row: dict[str, Any], where: str) -> str:
    value = column(row, adapter.cluster)
    if not adapter.cluster_modulo:
        return str(value)
    try:
        return str(int(float(value)) % adapter.cluster_modulo)
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"{adapter.name}: {where}: {adapter.cluster} {value!r} is no number"
        ) from error


def _first_clusters(
    adapter: Adapter, rows: list[tuple[int, RawRow]], limit: int
) -> set[str] | None:
    """Whole clusters, from the first on, until they hold ``limit`` rows; None: all."""
    if not limit or limit >= len(rows):
        return None
    names = [_cluster(adapter, raw, place) for place, (_, raw) in enumerate(rows, 1)]
    sizes, wanted, held = Counter(names), set[str](), 0
    for name in dict.fromkeys(names):
        if held >= limit:
            break
        wanted.add(name)
        held += sizes[name]
    return wanted


_RANGE = re.compile(r"\{1\.\.(\d+)\}")


def _files(adapter: Adapter, data: Path) -> list[Path]:
    for pattern in adapter.files:
        found: list[Path] = []
        if parts := _RANGE.search(pattern):
            names = [_RANGE.sub(str(n), pattern) for n in range(1, int(parts[1]) + 1)]
            each = [sorted(data.glob(name)) for name in names]
            found = [path for paths in each for path in paths] if all(each) else []
        else:
            found = sorted(data.glob(pattern))
        if found:
            break
    else:
        raise EvaluationError(
            f"{adapter.name}: {data} holds none of {', '.join(adapter.files)}"
            + (f"; the official files are at {adapter.source}" if adapter.source else "")
        )
    return found


def _rows(adapter: Adapter, files: list[Path]) -> Iterator[tuple[int, RawRow]]:
    for number, file in enumerate(files, 1):
        for raw in read_rows(str(file)):
            row = raw.row
            if isinstance(row, dict) and len(row) > 1 and all(
                isinstance(value, dict) for value in row.values()
            ):  # fmt: skip
                for key, value in row.items():  # a mapping of names to rows
                    yield number, RawRow(f"{raw.where} {key!r}", raw.folder, {"key": key, **value})
            else:
                yield number, raw


def _counts(adapter: Adapter, raw: RawRow, first: bool) -> bool:
    """Whether a row is one of the benchmark's."""
    if isinstance(raw.row, DataError):
        raise EvaluationError(f"{adapter.name}: {raw.row}")
    if first:
        _check_columns(adapter, raw)
    for name, value in adapter.where.items():
        found = column(raw.row, name)
        if found not in value if isinstance(value, tuple) else found != value:
            return False
    return all(not is_nothing(column(raw.row, name)) for name in adapter.skip_without)


def _check_columns(adapter: Adapter, raw: RawRow) -> None:
    row = raw.row
    assert isinstance(row, dict)
    needed = [adapter.answer, adapter.kind_column, adapter.id, *adapter.where]
    needed.append(adapter.question)
    needed += [adapter.options] if isinstance(adapter.options, str) else adapter.options[:2]
    needed += [adapter.cluster, adapter.picture_rows, adapter.rubric]
    for name in needed:
        if name and "{" not in name and name.split(".")[0] not in row:
            raise EvaluationError(
                f"{adapter.name}: {raw.where} has no column {name!r}; it has "
                f"{', '.join(sorted(map(str, row)))}"
            )
    if adapter.one_of and not any(name in row for name in adapter.one_of):
        raise EvaluationError(
            f"{adapter.name}: {raw.where} has none of the picture columns "
            f"{', '.join(adapter.one_of)}; it has {', '.join(sorted(map(str, row)))}"
        )


def _question(
    adapter: Adapter, raw: RawRow, file: int, number: int, notes: Counter[str],
    others: dict[str, dict[str, Any]],
) -> Question:  # fmt: skip
    row = raw.row
    assert isinstance(row, dict)
    name = str(column(row, adapter.id)) if adapter.id else str(number)
    variant = str(file) if adapter.variants == "file" else ""
    if adapter.variants == "file":
        name = f"{name}/{file}"
    elif adapter.variants:
        variant = str(column(row, adapter.variants))
    where = f"{adapter.name}: {raw.where}"
    options = _options(adapter, row, where)
    kind = adapter.kinds.get(str(column(row, adapter.kind_column)), adapter.kind)
    if adapter.choice_where_options:
        kind = "choice" if options else kind
    order = tuple(range(len(options)))
    if adapter.shuffled:
        order = tuple(sorted(order, key=lambda i: _digest(f"{name}/{i}")))
    text = adapter.question_prefix + _text(column(row, adapter.question))
    text, images, numbers = _with_pictures(adapter, raw, text, where, notes, others)
    answer = column(row, adapter.answer)
    if adapter.answers:
        if str(answer) not in adapter.answers:
            raise EvaluationError(
                f"{where}: answer {answer!r} is none of {', '.join(adapter.answers)}"
            )
        answer = adapter.answers[str(answer)]
    decimals = adapter.decimals
    if adapter.decimals_column and not is_nothing(value := column(row, adapter.decimals_column)):
        decimals = int(float(value))
    return Question(
        id=name,
        text=text,
        kind=kind,
        answer=_answer(answer, kind, options, order, where, adapter.answer_is),
        options=tuple(options[place] for place in order),
        order=order,
        images=images,
        numbers=numbers,
        cluster=_named_cluster(adapter, row, raw.where) if adapter.cluster else name,
        variant=variant,
        groups=_groups(adapter, row),
        decimals=decimals,
        tolerance=adapter.tolerance,
        official=_text(column(row, adapter.official_question)) if adapter.official_question else "",
        rubric=_rubric(adapter, row, where),
        rubric_mark=adapter.rubric_mark,
    )


def _groups(adapter: Adapter, row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    found = []
    for key in adapter.groups:
        value = str(column(row, key))
        parts = value.split(adapter.groups_separator) if adapter.groups_separator else [value]
        found += [(key, part.strip()) for part in parts]
    return tuple(found)


def _rubric(adapter: Adapter, row: dict[str, Any], where: str) -> str:
    text = _text(column(row, adapter.rubric)) if adapter.rubric else ""
    if adapter.rubric and adapter.rubric_mark not in text:
        raise EvaluationError(f"{where}: its {adapter.rubric} does not hold {adapter.rubric_mark}")
    return text


def _text(value: Any) -> str:
    return "" if is_nothing(value) else str(value).strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _options(adapter: Adapter, row: dict[str, Any], where: str) -> list[str]:
    if not isinstance(adapter.options, str):
        found = [column(row, name) for name in adapter.options]
        return [str(option) for option in found if not is_nothing(option)]
    value = column(row, adapter.options) if adapter.options else None
    if isinstance(value, str):
        text = value.strip()
        if text[:1] in "[{":
            try:
                value = json.loads(text)
            except ValueError:
                try:
                    value = ast.literal_eval(text)
                except (ValueError, SyntaxError) as error:
                    raise EvaluationError(
                        f"{where}: options are not a list: {text[:80]!r}"
                    ) from error
        else:
            marks = list(_OPTION.finditer(text))
            if text and not marks:
                raise EvaluationError(f"{where}: no options in {text[:80]!r}")
            ends = [mark.start() for mark in marks[1:]] + [len(text)]
            value = [text[m.end() : end].strip(" ;\n") for m, end in zip(marks, ends, strict=True)]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value) if not is_nothing(value[key])]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return [str(option) for option in value or () if str(option) != "N/A"]


def letters_of(text: str) -> str:
    """The letters of an answer that names options and nothing else: "(C)", "B, D", "C\\nD"; "" of
    any other."""
    bare = re.sub(r"[\s,;.()\[\]{}&:]|\band\b", "", text)
    known = bool(bare) and bare.isupper() and bare.isascii() and set(bare) <= set(LETTERS)
    return "".join(sorted(set(bare))) if known and len(set(bare)) == len(bare) else ""


def _answer(
    value: Any, kind: Kind, options: list[str], order: tuple[int, ...], where: str, answer_is: str
) -> str:
    if kind != "choice":
        if isinstance(value, list | np.ndarray):
            return json.dumps([str(item) for item in value])
        return _text(value)
    if isinstance(value, bool | np.bool_):
        value = str(bool(value))
    if isinstance(value, int | np.integer):
        if not 0 <= int(value) < len(options):
            raise EvaluationError(f"{where}: answer {value} of {len(options)} options")
        return LETTERS[order.index(int(value))]
    text = _text(value)
    same = [place for place, option in enumerate(options) if option.strip() == text]
    found = letters_of(text)
    known = found and (not options or all(LETTERS.index(x) < len(options) for x in found))
    if len(same) == 1 and (answer_is == "text" or not known):
        return LETTERS[order.index(same[0])]
    if known:
        return "".join(
            sorted(LETTERS[order.index(LETTERS.index(x))] if options else x for x in found)
        )
    if options:
        raise EvaluationError(
            f"{where}: answer {text[:60]!r} is none of its {len(options)} options"
        )
    return text


def _with_pictures(
    adapter: Adapter, raw: RawRow, text: str, where: str, notes: Counter[str],
    others: dict[str, dict[str, Any]],
) -> tuple[str, tuple[ImageFile, ...], tuple[int, ...]]:  # fmt: skip
    """The text, the pictures, and the numbers of their columns."""
    row = raw.row
    assert isinstance(row, dict)
    names = [name for name in adapter.pictures if not is_nothing(column(row, name))]
    if adapter.one_of:
        names += [name for name in adapter.one_of if not is_nothing(column(row, name))][:1]
    items: list[Any] = []
    for name in names:
        value = column(row, name)
        if isinstance(value, str | int) and str(value) in others:
            value = column(others[str(value)], name)
        items += value if isinstance(value, list) else [value]

    def image(item: Any) -> ImageFile:
        try:
            return read_image(
                item, folder=raw.folder, where=where, max_pixels=MAX_PIXELS, notes=notes
            )
        except DataError as error:
            raise EvaluationError(str(error)) from error

    images = [image(item) for item in items]
    if adapter.marks:
        text = re.sub(r" *" + adapter.marks, "", text).strip()
    numbers = [int(found[-1]) if (found := re.findall(r"\d+", name)) else 1 for name in names]
    if adapter.bound_marks:
        for mark in re.finditer(adapter.bound_marks, text):
            if int(mark.group(1)) not in numbers:
                raise EvaluationError(f"{where}: the row has no picture for {mark.group()}")
    return text, tuple(images), tuple(numbers[: len(images)])
