"""Reads a source once, with all cores, into a store.

    python -m ovr_fast.data.index JOB.json FOLDER ANSWER.json

is what the first rank starts for a source that takes more than a few seconds: a process without
threads, GPU or process group, which loads the tokenizer, then forks its readers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ovr_fast.config import DataSource
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError, ImageError
from ovr_fast.data.files import RawRow, count_rows, files_of, read_rows
from ovr_fast.data.formats import RowFormat
from ovr_fast.data.images import image_limits
from ovr_fast.data.prompts import Measure, Reading, ReadRow, check_reading, read_row
from ovr_fast.data.rows import render
from ovr_fast.data.store import VERSION, StoredRow, StoreWriter, current, stored
from ovr_fast.lifetime import end_with_parent
from ovr_fast.records import Prompt

GLANCE_S = 2.0
"""After which a source says how long it will take, by the rows that it has."""
INLINE_S = 20.0
"""A source that is read in this time needs no processes of its own, which take 4 s to start."""
CHUNK = 32
"""Rows that a reader takes at a time."""
FIRST_ROWS = 1000
"""Of which one must say the format."""
SAY_EVERY_S = 10.0
MODEL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "special_tokens_map.json", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """What a store is made from."""

    source: DataSource
    need: str  # "answer" or "response"
    turns: str  # of a conversation that are trained, for "response"
    model: str  # folder of the tokenizer and processor
    image_token_id: int

    def key(self) -> str:
        """A name for all that the store depends on."""
        source = asdict(self.source) | {"weight": 0}
        source["image_folder"] = str(Path(self.source.image_folder).absolute())
        parts: list[Any] = [VERSION, source, self.need, self.turns]
        for name in MODEL_FILES:
            path = Path(self.model) / name
            if path.is_file():
                parts.append([name, hashlib.sha256(path.read_bytes()).hexdigest()])
        files = files_of(self.source.path, split=self.source.split)
        for path in files:
            found = os.stat(path)
            parts.append([str(path.resolve()), found.st_size, found.st_mtime_ns])
        if not files:  # a dataset by its name: nothing says whether it has changed
            parts.append(time.time_ns())
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]+", "_", self.source.name or Path(self.source.path).stem)[:60]
        return f"{name}-{self.need}-{digest}"


def prompt_tokens(chat: ChatTemplate) -> Measure:
    """Counts a prompt's tokens as servers will be asked it."""

    def measure(prompt: Prompt) -> tuple[int, int]:
        return len(chat.encode(prompt.messages, prompt.images, generation_prompt=True)), 0

    return measure


def demonstration_tokens(chat: ChatTemplate, turns: str) -> Measure:
    """Counts a demonstration's tokens as it is trained, and those that are."""

    def measure(prompt: Prompt) -> tuple[int, int]:
        sequence = render(prompt, chat, turns=turns)
        return len(sequence.tokens), sequence.response_length

    return measure


def measure_of(job: Job, chat: ChatTemplate) -> Measure:
    """How a job's rows are counted."""
    return demonstration_tokens(chat, job.turns) if job.need == "response" else prompt_tokens(chat)


def ensure_store(job: Job, chat: ChatTemplate, cache: Path, *, workers: int) -> Path:
    """The folder of the source's store, made where it is not there.

    Args:
        workers: processes that read; 0: as many as there are cores.

    Raises:
        DataError: the source is empty, a row cannot be used and ``on_bad_row`` says stop, or too
            many cannot.
    """
    place = cache / job.key()
    if (found := current(place)) is not None:
        return found
    return _build_here(job, chat, place) or _build_apart(job, place, workers)


def _build_here(job: Job, chat: ChatTemplate, place: Path) -> Path | None:
    """Build it in this process; None where that takes too long."""
    reading, writer, began = Reading(job.source), StoreWriter(place), time.monotonic()
    measure = measure_of(job, chat)
    try:
        looked = False
        for raw in read_rows(job.source.path, split=job.source.split):
            if not looked and (took := time.monotonic() - began) > GLANCE_S:
                looked = True
                if took * count_rows(job.source.path, job.source.split) > INLINE_S * reading.rows:
                    writer.discard()
                    return None
            _take(_read_one(raw, job, chat, measure, reading), reading, writer)
        check_reading(reading, len(writer))
        return writer.finish(reading.as_meta())
    except BaseException:
        writer.discard()
        raise


def _build_apart(job: Job, place: Path, workers: int) -> Path:
    """Build it in processes of its own, which end with this call, however it ends."""
    with tempfile.TemporaryDirectory() as scratch:
        spec, answer = Path(scratch) / "job.json", Path(scratch) / "answer.json"
        spec.write_text(json.dumps({**asdict(job), "workers": workers}))
        _run_reader([str(spec), str(place), str(answer)])
        try:
            found = json.loads(answer.read_text())
        except (OSError, ValueError):
            found = {"error": ""}
    if "error" in found:
        raise DataError(
            found["error"]
            or f"{job.source.path}: its reader was ended from outside (out of memory?); fewer "
            "run.data_workers need less"
        )
    return Path(found["store"])


def _run_reader(words: list[str]) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TOKENIZERS_PARALLELISM": "false",  # its readers are the parallelism
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "ovr_fast.data.index", *words]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its forks too
        process.wait()


def _read_one(
    raw: RawRow, job: Job, chat: ChatTemplate, measure: Measure, reading: Reading
) -> StoredRow | DataError:
    """A row as it is kept, or what is wrong with it."""
    reading.rows += 1
    row = read_row(raw, job.source, need=job.need, measure=measure, reading=reading)
    return _kept(row, chat)


def _kept(row: ReadRow, chat: ChatTemplate) -> StoredRow | DataError:
    if row.error is not None:
        return row.error
    assert row.prompt is not None
    most = image_limits([row.prompt], chat.image_processor)
    pictures = (most.count, most.width, most.height)
    return stored(row.prompt, tokens=row.tokens, trained=row.trained, pictures=pictures)


def _take(row: StoredRow | DataError, reading: Reading, writer: StoreWriter) -> None:
    if isinstance(row, StoredRow):
        writer.add(row)
    elif reading.source.on_bad_row == "stop":
        raise row
    else:
        reading.dropped.append(str(row))
        # It may be mended without the file of rows being touched: such a store is not used again.
        reading.images_dropped |= isinstance(row, ImageError)


def _end_with(parent: int) -> None:
    """A reader is not to be left behind by whoever reads."""
    end_with_parent()
    if os.getppid() != parent:
        os._exit(1)


_state: dict[str, Any] = {}
"""Of this process, for its forks: the job, the template, the format."""


def _read_chunk(rows: list[RawRow]) -> tuple[list[StoredRow | DataError], Counter[str], set[str]]:
    job, chat = _state["job"], _state["chat"]
    reading = Reading(job.source, format=_state["format"])
    measure = measure_of(job, chat)
    found = [_read_one(raw, job, chat, measure, reading) for raw in rows]
    return found, reading.notes, reading.columns


def build(job: Job, place: Path, *, workers: int) -> Path:
    """Read the source with ``workers`` forks of this process; returns the store's folder."""
    _state["job"] = job
    _state["chat"] = ChatTemplate(job.model, image_token_id=job.image_token_id)
    reading, writer = Reading(job.source), StoreWriter(place)
    began = said = time.monotonic()
    try:
        rows = read_rows(job.source.path, split=job.source.split)
        ahead, first = _until_format(rows, job)
        _state["format"] = reading.format = first
        with ProcessPoolExecutor(
            workers, mp_context=get_context("fork"), initializer=_end_with, initargs=(os.getpid(),)
        ) as pool:
            waiting: deque[Future] = deque()
            for chunk in _chunks(ahead, rows):
                waiting.append(pool.submit(_read_chunk, chunk))
                if len(waiting) >= 4 * workers:
                    _collect(waiting.popleft(), reading, writer)
                if time.monotonic() - said > SAY_EVERY_S:
                    said = time.monotonic()
                    speed = reading.rows / (said - began)
                    print(f"{job.source.path}: read {reading.rows:,} rows, {speed:,.0f} a second",
                          file=sys.stderr, flush=True)  # fmt: skip
            while waiting:
                _collect(waiting.popleft(), reading, writer)
        check_reading(reading, len(writer))
        return writer.finish(reading.as_meta())
    except BaseException:
        writer.discard()
        raise


def _until_format(rows: Iterator[RawRow], job: Job) -> tuple[list[RawRow], RowFormat | None]:
    """The rows up to the first that says the format, which all readers must take alike."""
    ahead = []
    for raw in rows:
        ahead.append(raw)
        if isinstance(raw.row, dict):
            with contextlib.suppress(DataError):  # a bad row: see read_row
                return ahead, RowFormat(job.source, raw.row, raw.where)
        if len(ahead) > FIRST_ROWS:
            break
    return ahead, None


def _chunks(ahead: list[RawRow], rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    chunk = list(ahead)
    for raw in rows:
        chunk.append(raw)
        if len(chunk) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _collect(future: Future, reading: Reading, writer: StoreWriter) -> None:
    found, notes, columns = future.result()
    reading.rows += len(found)
    reading.notes.update(notes)
    reading.columns.update(columns)
    for row in found:
        _take(row, reading, writer)


def main() -> None:
    _end_with(os.getppid())
    spec = json.loads(Path(sys.argv[1]).read_text())
    workers = spec.pop("workers") or len(os.sched_getaffinity(0))
    job = Job(**{**spec, "source": DataSource(**spec["source"])})
    answer: dict[str, str] = {}
    try:
        answer["store"] = str(build(job, Path(sys.argv[2]), workers=workers))
    except DataError as error:
        answer["error"] = str(error)
    except BrokenProcessPool:
        answer["error"] = (
            f"{job.source.path}: a reader was ended from outside (out of memory?); fewer "
            "run.data_workers need less"
        )
    Path(sys.argv[3]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
