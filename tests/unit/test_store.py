"""Data read once: what a store gives back, when it is made anew, the cold start's rows of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ovr_fast.config import DataSource, load_config
from ovr_fast.data import index
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError
from ovr_fast.data.images import image_limits
from ovr_fast.data.index import Job, ensure_store, measure_of
from ovr_fast.data.prompts import Mixture, read
from ovr_fast.data.rows import DemonstrationRows, render
from ovr_fast.data.store import FileSlice, StoredPrompts
from ovr_fast.data.streams import RunData
from ovr_fast.shape.model_shape import read_shape
from support.row_cases import png
from support.toy_run import BASE_MODEL, ROOT


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(BASE_MODEL, image_token_id=read_shape(BASE_MODEL).image_token_id)


def job_of(path: Path, chat: ChatTemplate, need: str = "answer", **settings: object) -> Job:
    source = DataSource(path=str(path), **settings)  # type: ignore[arg-type]
    return Job(source, need, "all", str(BASE_MODEL), chat.image_token_id)


def write_rows(folder: Path, count: int = 40) -> Path:
    """Prompts, of which every third has an image file of its own."""
    rows = []
    for number in range(count):
        row: dict = {"prompt": f"What is {number}?", "answer": str(number), "id": f"row {number}"}
        if number % 3 == 0:
            (folder / f"{number}.png").write_bytes(png((30 + number, 40), "red"))
            row["images"] = [f"{number}.png"]
        rows.append(row)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=["here", "apart"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In the first rank's own process, or in processes of its own."""
    if request.param == "apart":
        monkeypatch.setattr(index, "_build_here", lambda *arguments: None)
    return request.param


def test_a_store_gives_what_was_read(tmp_path: Path, chat: ChatTemplate, way: str) -> None:
    path = write_rows(tmp_path)
    job = job_of(path, chat)
    pool = StoredPrompts(ensure_store(job, chat, tmp_path / "cache", workers=2))
    prompts, tokens, _ = read(job.source, need="answer", measure=measure_of(job, chat))
    assert [pool[place] for place in range(len(pool))] == prompts
    assert [pool.size(place) for place in range(len(pool))] == [(n, 0) for n in tokens]
    for place in (0, 3, 39):
        assert [image.data for image in pool[place].images] == [
            image.data for image in prompts[place].images
        ]
    assert pool.image_limits() == image_limits(prompts, chat.image_processor)
    assert pool.image_limits().count == 1
    short = pool.within(sorted(tokens)[20])
    assert [short[place] for place in range(len(short))] == [
        prompt for prompt, n in zip(prompts, tokens, strict=True) if n <= sorted(tokens)[20]
    ]


def test_images_without_a_file_are_kept_once(tmp_path: Path, chat: ChatTemplate) -> None:
    table = pa.table({
        "prompt": ["a", "b", "c"],
        "images": [[png(), png(colour="blue")], [png()], []],
        "answer": ["1", "2", "3"],
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "rows.parquet")
    job = job_of(tmp_path / "rows.parquet", chat)
    folder = ensure_store(job, chat, tmp_path / "cache", workers=2)
    (tmp_path / "rows.parquet").unlink()
    pool = StoredPrompts(folder)
    assert [image.data for image in pool[0].images] == [png(), png(colour="blue")]
    assert pool[1].images[0].data == png()
    assert pool[2].images == ()
    assert isinstance(pool[1].images[0].stored, FileSlice)
    assert (folder / "images.bin").stat().st_size == len(png()) + len(png(colour="blue"))


def test_bad_rows_end_it_or_are_listed(
    tmp_path: Path, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path)
    with open(path, "a") as file:
        file.write("not JSON\n")
    cache = tmp_path / "cache"
    here = index._build_here
    for build in (lambda *arguments: None, here):  # apart, and here
        monkeypatch.setattr(index, "_build_here", build)
        with pytest.raises(DataError, match=r"rows.jsonl:41: not JSON"):
            ensure_store(job_of(path, chat), chat, cache, workers=2)
    assert list(cache.iterdir()) == []  # nothing half-written
    job = job_of(path, chat, on_bad_row="drop")
    folder = ensure_store(job, chat, cache, workers=2)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["rows"] == 41
    assert "rows.jsonl:41: not JSON" in meta["dropped"][0]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        ensure_store(job_of(tmp_path / "empty.jsonl", chat), chat, cache, workers=2)


def test_a_store_is_made_once_and_anew_when_something_changes(
    tmp_path: Path, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_rows(tmp_path), tmp_path / "cache"
    made: list[Path] = []
    build = index._build_here

    def counted(job: Job, chat: ChatTemplate, place: Path) -> Path | None:
        made.append(place)
        return build(job, chat, place)

    monkeypatch.setattr(index, "_build_here", counted)

    def makes(job: Job) -> bool:
        before = len(made)
        ensure_store(job, chat, cache, workers=1)
        return len(made) > before

    job = job_of(path, chat)
    assert makes(job)
    assert not makes(job)
    assert not makes(replace(job, source=replace(job.source, weight=3.0)))
    assert makes(replace(job, source=replace(job.source, name="other")))
    (tmp_path / "3.png").write_bytes(png((64, 64), "blue"))  # an image
    assert makes(job)
    assert not makes(job)
    os.utime(path, ns=(0, 0))  # the file of rows
    assert makes(job)
    (tmp_path / "6.png").unlink()
    with pytest.raises(DataError, match=r"6.png: No such file"):
        makes(job)


def test_a_store_in_use_goes_on_when_it_is_made_anew(tmp_path: Path, chat: ChatTemplate) -> None:
    path, cache = write_rows(tmp_path), tmp_path / "cache"
    job = job_of(path, chat, on_bad_row="drop")
    old = StoredPrompts(ensure_store(job, chat, cache, workers=1))
    (tmp_path / "0.png").unlink()
    new = StoredPrompts(ensure_store(job, chat, cache, workers=1))
    assert (len(old), len(new)) == (40, 39)
    assert [old[place].id for place in range(40)] == [f"row {n}" for n in range(40)]
    assert new[0].id == "row 1"
    (tmp_path / "0.png").write_bytes(png((30, 40)))  # mended: the row comes back
    assert len(StoredPrompts(ensure_store(job, chat, cache, workers=1))) == 40


def test_images_that_are_written_anew_are_watched_too(tmp_path: Path, chat: ChatTemplate) -> None:
    def write(colour: tuple[int, int, int, int]) -> None:
        Image.new("RGBA", (30, 20), colour).save(tmp_path / "clear.png")

    write((255, 0, 0, 128))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "image": "clear.png", "answer": "1"}) + "\n")
    job = job_of(path, chat)
    before = StoredPrompts(ensure_store(job, chat, tmp_path / "cache", workers=1))[0].images[0]
    write((0, 0, 255, 128))
    after = StoredPrompts(ensure_store(job, chat, tmp_path / "cache", workers=1))[0].images[0]
    assert before.digest != after.digest
    (tmp_path / "clear.png").unlink()
    with pytest.raises(DataError, match="clear.png: No such file"):
        ensure_store(job, chat, tmp_path / "cache", workers=1)


def test_relative_folders_are_those_of_the_working_directory(
    tmp_path: Path, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "image": "a.png", "answer": "1"}) + "\n")
    found = []
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name / "pictures").mkdir(parents=True)
        (tmp_path / name / "pictures" / "a.png").write_bytes(png(colour=colour))
        monkeypatch.chdir(tmp_path / name)
        job = job_of(path, chat, image_folder="pictures")
        found.append(StoredPrompts(ensure_store(job, chat, tmp_path / "cache", workers=1)))
    monkeypatch.chdir(tmp_path)
    assert [pool[0].images[0].data for pool in found] == [png(), png(colour="blue")]


def test_a_disk_that_is_full_is_one_message(
    tmp_path: Path, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_rows(tmp_path), tmp_path / "cache"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("ovr_fast.data.store.StoreWriter._write", lambda self, row: fill(self))

    def fill(writer) -> None:
        writer._rows.write(b"x" * 100_000)
        writer._rows.flush()

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            DataError, match=r"cannot be kept \(File too large\); set run.data_cache"
        ):
            ensure_store(job_of(path, chat), chat, cache, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(cache.rglob("*")) == []


def test_readers_that_are_killed_are_one_message_and_leave_nothing(
    tmp_path: Path, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path, 3)
    with open(path, "a") as file:
        file.writelines(
            json.dumps({"prompt": f"p {n}", "answer": "1"}) + "\n" for n in range(60_000)
        )
    monkeypatch.setattr(index, "_build_here", lambda *arguments: None)

    def readers() -> list[psutil.Process]:
        return [
            process for process in psutil.process_iter(["cmdline"])
            if "ovr_fast.data.index" in (process.info["cmdline"] or [])
            and any(str(tmp_path) in word for word in process.info["cmdline"])
        ]  # fmt: skip

    def kill() -> None:
        for _ in range(400):
            time.sleep(0.05)
            if len(found := readers()) >= 3:
                found[-1].kill()
                return

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(DataError, match=r"ended from outside \(out of memory\?\); fewer run.data"):
        ensure_store(job_of(path, chat), chat, tmp_path / "cache", workers=2)
    thread.join()
    assert readers() == []
    assert [path.name for path in (tmp_path / "cache").rglob("*.partial")] == []


def test_a_run_reads_on_its_first_rank_alone(tmp_path: Path, chat: ChatTemplate) -> None:
    """Other ranks get the folder's name, and open it."""
    path = write_rows(tmp_path)
    words = [
        f'rl.sources=[{{path="{path}"}}]', f'evaluation.sources=[{{path="{path}"}}]',
        f"run.root={tmp_path}", "rl.max_prompt_tokens=64", f"model.path={BASE_MODEL}",
    ]  # fmt: skip
    config = load_config(ROOT / "configs" / "tiny.toml", words)
    told: list = []

    def first(work):
        told.append(work())
        return told[-1]

    answers: Iterator = iter(())

    def other(work):
        return next(answers)

    one = RunData.of(config, chat, first)
    stream, sets = one.training_stream("rl"), one.evaluation_sets()
    answers = iter(told)
    two = RunData.of(config, chat, other)
    again, same = two.training_stream("rl"), two.evaluation_sets()
    assert stream.take(50) == again.take(50)
    assert sets == same
    assert one.image_limits == two.image_limits
    assert one.said == two.said
    assert "format columns (it has prompt)" in one.said[0]


def rows_of(
    pool: StoredPrompts, chat: ChatTemplate, *, replica: int = 0, replicas: int = 1
) -> DemonstrationRows:
    return DemonstrationRows(
        Mixture([pool], [1.0], seed=3), chat, row_tokens=64, rows=4, turns="all",
        cost=lambda tokens, trained: tokens**2 + trained, replica=replica, replicas=replicas,
    )  # fmt: skip


@pytest.fixture(scope="module")
def demonstrations(chat: ChatTemplate, tmp_path_factory: pytest.TempPathFactory) -> StoredPrompts:
    folder = tmp_path_factory.mktemp("demonstrations")
    rng = np.random.default_rng(0)
    path = folder / "texts.jsonl"
    path.write_text("".join(
        json.dumps({"prompt": f"q{n}", "response": "red " * int(rng.integers(1, 30))}) + "\n"
        for n in range(50)
    ))  # fmt: skip
    job = job_of(path, chat, "response")
    return StoredPrompts(ensure_store(job, chat, folder / "cache", workers=1))


def test_replicas_render_their_own_rows_and_together_all(
    demonstrations: StoredPrompts, chat: ChatTemplate
) -> None:
    whole = rows_of(demonstrations, chat)
    halves = [rows_of(demonstrations, chat, replica=r, replicas=2) for r in range(2)]
    for _ in range(5):
        batch, parts = whole.next(), [half.next() for half in halves]
        assert all(part.rows == batch.rows for part in parts)
        assert all(len(part.own) == 2 for part in parts)
        names = sorted(s.name for row in batch.own for s in row)
        assert names == sorted(s.name for part in parts for row in part.own for s in row)
        for row, rendered in zip(batch.rows, batch.own, strict=False):
            assert sum(d.tokens for d in row) <= 64
            assert len(rendered) > 0
        drawn = {
            (demonstrations[d.place].id, d.tokens, d.trained) for row in batch.rows for d in row
        }
        assert drawn == {
            (s.name, len(s.tokens), s.response_length) for row in batch.own for s in row
        }


def test_rows_go_on_from_the_batch_that_was_given_out(
    demonstrations: StoredPrompts, chat: ChatTemplate
) -> None:
    """Not from the one that was made ahead."""
    rows = rows_of(demonstrations, chat)
    for _ in range(3):
        rows.next()
    state = json.loads(json.dumps(rows.state()))
    wanted = [rows.next().rows for _ in range(3)]
    fresh = rows_of(demonstrations, chat)
    fresh.next()
    fresh.restore(state)
    assert [fresh.next().rows for _ in range(3)] == wanted


def test_demonstrations_longer_than_a_row_are_left_out_at_the_start(
    tmp_path: Path, chat: ChatTemplate
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(
        json.dumps({"prompt": "q", "response": "red " * words}) + "\n" for words in (3, 100, 5)
    ))  # fmt: skip

    def stream(row_tokens: int) -> tuple[RunData, Mixture]:
        words = [
            f'cold_start.sources=[{{path="{path}"}}]', f"run.root={tmp_path}",
            f"model.path={BASE_MODEL}", f"cold_start.row_tokens={row_tokens}",
        ]  # fmt: skip
        config = load_config(ROOT / "configs" / "tiny.toml", words)
        data = RunData.of(config, chat, lambda work: work())
        return data, data.training_stream("cold_start")

    data, mixture = stream(64)
    assert len(mixture.pools[0]) == 2
    assert data.left_out == {"cold_start": 1}
    assert "1 rows over 64 tokens left out" in data.said[0]
    with pytest.raises(DataError, match=r"all 3 rows are longer than cold_start.row_tokens=5"):
        stream(5)


def test_a_source_that_has_changed_since_the_checkpoint_is_named(
    demonstrations: StoredPrompts, chat: ChatTemplate
) -> None:
    state = rows_of(demonstrations, chat).state()
    state["stream"]["sizes"] = [51]
    with pytest.raises(DataError, match=r"have \[50\] prompts, and had \[51\] when the checkpoint"):
        rows_of(demonstrations, chat).restore(state)


def test_sizes_are_those_of_what_is_rendered(
    demonstrations: StoredPrompts, chat: ChatTemplate
) -> None:
    for place in range(len(demonstrations)):
        sequence = render(demonstrations[place], chat)
        assert demonstrations.size(place) == (len(sequence.tokens), sequence.response_length)
