"""Files as people have them: the table of rows, kinds of files, settings of a source, bad rows, and
mutated rows and images."""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import json
import random
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ovr_fast.config import SOURCE_FORMATS, DataSource
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.check import check
from ovr_fast.data.errors import DataError, ImageError
from ovr_fast.data.files import read_rows
from ovr_fast.data.formats import FORMATS
from ovr_fast.data.images import load_image
from ovr_fast.data.index import prompt_tokens
from ovr_fast.data.prompts import Reading, iterate, read
from ovr_fast.data.rows import render
from ovr_fast.records import Prompt
from ovr_fast.score import encode_conversations
from ovr_fast.shape.model_shape import read_shape
from support.row_cases import CASES, COLD, RL, png
from support.toy_run import BASE_MODEL


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(BASE_MODEL, image_token_id=read_shape(BASE_MODEL).image_token_id)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures that the table names."""
    place = tmp_path_factory.mktemp("rows")
    (place / "a.png").write_bytes(png())
    (place / "cut.png").write_bytes(png()[:60])
    (place / "html.png").write_text("<html></html>")
    (place / "long.png").write_bytes(png((1, 250)))
    return place


def written(prompt: Prompt, need: str = RL) -> str:
    """A prompt as the table writes it."""
    turns = []
    for message in prompt.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join("[image]" if part["type"] == "image" else part["text"] for part in parts)
        turns.append(f"{message['role']}: {text}")
    end = f" => {prompt.response}" if need == COLD else f" -> {prompt.answer}"
    return " / ".join(turns) + end


def as_line(row: Any) -> bytes:
    if isinstance(row, bytes):
        return row
    return (row if isinstance(row, str) else json.dumps(row)).encode()


@pytest.mark.parametrize(("why", "need", "row", "expected"), CASES, ids=[c[0] for c in CASES])
def test_the_table_of_rows(
    folder: Path, chat: ChatTemplate, why: str, need: str, row: Any, expected: str
) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(as_line(row) + b"\n")
    source = DataSource(path=str(path))
    measure = prompt_tokens(chat) if need == RL else None
    if not expected.startswith("!"):
        (prompt,), (tokens,), reading = read(source, need=need, measure=measure)
        assert written(prompt, need) == expected
        assert need == COLD or tokens == len(
            chat.encode(prompt.messages, prompt.images, generation_prompt=True)
        )
        assert reading.describe()
        return
    with pytest.raises(DataError) as caught:
        read(source, need=need, measure=measure)
    assert expected[1:] in str(caught.value)
    assert f"{path}:1" in str(caught.value) or f"{path}:row 1" in str(caught.value)


def test_the_table_has_as_many_rows_as_it_should() -> None:
    assert len({case[0] for case in CASES}) == len(CASES) >= 120


def test_the_check_and_training_agree_on_every_row(
    folder: Path, chat: ChatTemplate, capsys: pytest.CaptureFixture
) -> None:
    for number, (_, need, row, expected) in enumerate(CASES):
        path = folder / f"check-{number}.jsonl"
        path.write_bytes(as_line(row) + b"\n")
        source = DataSource(path=str(path))
        fine = check(source, chat=chat, method="exact", need=need)
        said = capsys.readouterr().out
        assert fine is not expected.startswith("!"), (row, said)
        if not fine:
            assert expected[1:] in said


ROWS = [{"prompt": "a", "answer": "3"}, {"prompt": "b", "answer": "4"}]
READ = ["user: a -> 3", "user: b -> 4"]


def lines(rows: list) -> bytes:
    return b"".join(as_line(row) + b"\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.ndjson", lines(ROWS)),
        ("a.json", lines(ROWS)),
        ("a.JSONL", lines(ROWS)),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
        ("a.jsonl", lines(ROWS).replace(b"\n", b"\r\n")),
        ("a.jsonl", b"\n" + lines(ROWS).replace(b"\n", b"\n\n")),
        ("a.jsonl", lines(ROWS).rstrip(b"\n")),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.jsonl", json.dumps(ROWS).encode()),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()),
        ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode()),
        ("a.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("a.csv", b"prompt,answer\na,3\nb,4\n"),
        ("a.csv", b"\xef\xbb\xbfprompt,answer\r\na,3\r\nb,4\r\n"),
        ("a.csv", b'prompt,answer\n"a","3"\n"b","4"\n'),
        ("a.tsv", b"prompt\tanswer\na\t3\nb\t4\n"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)),
        ("a.csv.bz2", bz2.compress(b"prompt,answer\na,3\nb,4\n")),
    ],
    ids=count(),
)
def test_kinds_of_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    prompts, _, _ = read(DataSource(path=str(tmp_path / name)), need=RL)
    assert [written(prompt) for prompt in prompts] == READ


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(ROWS).decode().encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"[1]", "a.json:row 1: a int, not an object"),
        ("a.jsonl", lines([*ROWS, "{"]), "a.jsonl:3: not JSON"),
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"prompt,answer\na,3,4\n", "a.csv:2: 3 cells under 2 columns"),
        ("a.csv", b'prompt,answer\n"a,3\n', "a.csv:1: not CSV"),
        ("a.csv", b"prompt,answer,images\na,3\n", "a.csv:2: 2 cells under 3 columns"),
        ("a.csv", b"prompt,answer,answer\na,3,4\n", "two columns are called 'answer'"),
        ("a.csv", b"prompt,answer\ncaf\xe9,3\n", "a.csv:2: not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS) * 99, mtime=0)[:-40], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:12] + b"\xff" * 40, "cannot be read"),
        ("a.parquet", b"PAR1", "not a Parquet file"),
        ("a.mp4", b"", "of an unknown kind"),
        ("a.txt", b"a", "of an unknown kind"),
    ],
    ids=count(),
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / name).write_bytes(content)
    source = DataSource(path=str(tmp_path / name))
    with pytest.raises(DataError, match=message):
        read(source, need=RL)
    assert not check(source, chat=None, method="exact")
    assert message in capsys.readouterr().out


def test_folders_and_patterns_are_read_in_order(tmp_path: Path) -> None:
    for number in (1, 0):
        (tmp_path / f"train-{number:05d}-of-00002.jsonl").write_bytes(lines([ROWS[number]]))
    (tmp_path / "test-00000-of-00001.jsonl").write_bytes(lines([{"prompt": "t", "answer": "5"}]))
    for path, split, wanted in (
        (str(tmp_path), "train", READ),
        (str(tmp_path), "test", ["user: t -> 5"]),
        (str(tmp_path / "train-*.jsonl"), "train", READ),
    ):
        prompts, _, _ = read(DataSource(path=path, split=split), need=RL)
        assert [written(prompt) for prompt in prompts] == wanted
    with pytest.raises(DataError, match="no file has a name like this"):
        read(DataSource(path=str(tmp_path / "none-*.jsonl")), need=RL)
    with pytest.raises(DataError, match=r"no file of split 'validation'; .* have test, train"):
        read(DataSource(path=str(tmp_path), split="validation"), need=RL)
    (tmp_path / "train-x.csv").write_bytes(b"prompt,answer\na,3\n")
    with pytest.raises(DataError, match=r"several kinds \(.csv, .jsonl\)"):
        read(DataSource(path=str(tmp_path)), need=RL)


def test_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text("file_name,prompt,answer\na.png,What?,red\n")
    (prompt,), _, reading = read(DataSource(path=str(tmp_path)), need=RL)
    assert written(prompt) == "user: [image]What? -> red"
    assert "format imagefolder" in reading.describe()


def test_parquet_floats_are_as_long_as_they_were(tmp_path: Path) -> None:
    table = pa.table({
        "prompt": ["a"] * 3,
        "answer": pa.array([0.1, 1e-5, 3.0], pa.float32()),
        "half": pa.array(np.array([0.1] * 3, np.float16)),
        "record": pa.array([{"x": [0.1]}] * 3, pa.struct({"x": pa.list_(pa.float32())})),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "a.parquet")
    prompts, _, _ = read(DataSource(path=str(tmp_path / "a.parquet")), need=RL)
    assert [prompt.answer for prompt in prompts] == ["0.1", "0.00001", "3.0"]
    rows = [raw.row for raw in read_rows(str(tmp_path / "a.parquet"))]
    assert rows[0]["half"] == 0.1  # type: ignore[index]
    assert rows[0]["record"] == {"x": [0.1]}  # type: ignore[index]


def test_a_row_is_not_taken_for_a_list_of_rows(tmp_path: Path) -> None:
    row = {"prompt": "q", "steps": [{"prompt": "x", "answer": "7"}], "answer": 1}
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(row, indent=indent))
        (prompt,), _, _ = read(DataSource(path=str(tmp_path / "a.json")), need=RL)
        assert written(prompt) == "user: q -> 1"


@pytest.mark.parametrize("saved", [True, False])
def test_classes_are_their_names_and_floats_their_text(tmp_path: Path, saved: bool) -> None:
    import datasets

    features = datasets.Features({
        "prompt": datasets.Value("string"), "answer": datasets.ClassLabel(names=["cat", "dog"]),
        "x": datasets.Value("float32"),
    })  # fmt: skip
    made = datasets.Dataset.from_dict(
        {"prompt": ["a", "b"], "answer": [1, 0], "x": [0.1, 0.2]}, features=features
    )
    path = tmp_path / "saved" if saved else tmp_path / "a.parquet"
    made.save_to_disk(str(path)) if saved else made.to_parquet(str(path))
    prompts, _, _ = read(DataSource(path=str(path)), need=RL)
    assert [prompt.answer for prompt in prompts] == ["dog", "cat"]
    prompts, _, _ = read(DataSource(path=str(path), answer="x"), need=RL)
    assert [prompt.answer for prompt in prompts] == ["0.1", "0.2"]


def test_columns_may_be_records_and_must_be_there(tmp_path: Path) -> None:
    rows = [{"q": "a", "about": {"gold": {"value": 3}}, "level": 1}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    source = DataSource(path=str(tmp_path / "a.jsonl"), prompt="q", answer="about.gold.value")
    (prompt,), _, reading = read(source, need=RL)
    assert written(prompt) == "user: a -> 3"
    assert "format columns (columns are set: answer, prompt)" in reading.describe()
    assert "not read: level" in reading.describe()
    with pytest.raises(DataError, match="no row has the column 'pics'"):
        read(replace(source, images="pics"), need=RL)
    with pytest.raises(DataError, match="no answer in column 'about.gold.none'"):
        read(replace(source, answer="about.gold.none"), need=RL)
    with pytest.raises(DataError, match=r"no column 'prompt', which format='verl' needs"):
        read(DataSource(path=source.path, format="verl"), need=RL)


def test_what_holds_images_and_is_not_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"prompt": "a", "pics": ["a.png"], "image": "a.png", "answer": "3"}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    source = DataSource(path=str(tmp_path / "a.jsonl"), images="pics")
    with pytest.raises(DataError, match="column 'image' holds something and is not read"):
        read(source, need=RL)


def test_images_may_lie_in_another_folder_and_have_a_limit(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png((100, 50)))
    (tmp_path / "a.jsonl").write_bytes(lines([{"prompt": "a", "image": "a.png", "answer": "3"}]))
    source = DataSource(
        path=str(tmp_path / "a.jsonl"), image_folder=str(tmp_path / "pictures"),
        max_image_pixels=5000,
    )  # fmt: skip
    (prompt,), _, _ = read(source, need=RL)
    assert len(prompt.images) == 1
    with pytest.raises(ImageError, match=r"100 x 50 pixels, over max_image_pixels=4,999"):
        read(replace(source, max_image_pixels=4999), need=RL)


def test_bad_rows_are_dropped_counted_and_bounded(tmp_path: Path) -> None:
    rows = [*ROWS * 10, "not JSON", {"prompt": "a"}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    source = DataSource(path=str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="a.jsonl:21: not JSON"):
        read(source, need=RL)
    source = replace(source, on_bad_row="drop", max_bad_share=0.1)
    prompts, tokens, reading = read(source, need=RL)
    assert len(prompts) == len(tokens) == 20
    assert [message.split(": ")[0] for message in reading.dropped] == [
        f"{source.path}:21", f"{source.path}:22",
    ]  # fmt: skip
    assert "22 rows" in reading.describe()
    assert "2 dropped (dropped_rows.txt), the first" in reading.describe()
    with pytest.raises(DataError, match=r"2 of 22 rows cannot be used, over max_bad_share=0.09"):
        read(replace(source, max_bad_share=0.09), need=RL)


def test_what_the_model_refuses_is_dropped_too(tmp_path: Path, chat: ChatTemplate) -> None:
    (tmp_path / "long.png").write_bytes(png((1, 250)))
    rows = [*ROWS * 20, {"prompt": "a", "images": ["long.png"], "answer": "3"}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    source = DataSource(path=str(tmp_path / "a.jsonl"), on_bad_row="drop")
    prompts, _, reading = read(source, need=RL, measure=prompt_tokens(chat))
    assert len(prompts) == 40
    assert "aspect ratio" in reading.dropped[0]


@pytest.mark.parametrize(
    ("turns", "trained"),
    [("all", ["b<|im_end|>", "d d<|im_end|>"]), ("last", ["d d<|im_end|>"])],
)
def test_the_assistants_turns_are_trained_and_nothing_else(
    chat: ChatTemplate, turns: str, trained: list[str]
) -> None:
    turn = {"role": "user", "content": "c"}
    prompt = Prompt(
        id="x", data_source="y", images=(), answer=None, response="d d",
        messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, turn),
    )  # fmt: skip
    sequence = render(prompt, chat, turns=turns)
    places = sequence.response_places
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    assert [chat.tokenizer.decode(sequence.tokens[run]) for run in runs] == trained
    assert sequence.response_length == len(places)
    assert sequence.tokens[-1] == chat.end_token_id


PICTURES = {
    "PNG": "RGB", "JPEG": "RGB", "WEBP": "RGB", "BMP": "RGB", "GIF": "P", "TIFF": "RGB",
    "AVIF": "RGB", "PPM": "RGB",
}  # fmt: skip


def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    pixels.save(buffer, format=kind, **options)
    return buffer.getvalue()


def seen(data: bytes) -> np.ndarray:
    """The pixels of a file as any reader takes them."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_picture_gives_its_pixels(kind: str) -> None:
    data = picture(kind, PICTURES[kind])
    image = load_image(data, origin=kind)
    assert np.array_equal(seen(image.data), seen(data))
    with Image.open(io.BytesIO(image.data)) as opened:
        assert opened.format in ("PNG", "JPEG", "WEBP", "BMP")


@pytest.mark.parametrize(
    ("kind", "dtype", "scale"),
    [("PNG", np.uint16, 257), ("TIFF", np.uint16, 257), ("TIFF", np.float32, 1 / 255)],
)
def test_more_than_eight_bits_are_scaled(kind: str, dtype: Any, scale: float) -> None:
    grey = np.arange(256, dtype=np.float64).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray((grey * scale).astype(dtype)).save(buffer, format=kind)
    notes: Counter[str] = Counter()
    image = load_image(buffer.getvalue(), origin="a", notes=notes)
    assert np.abs(seen(image.data)[..., 0] - grey).max() <= 0.5
    assert any("scaled to 8 bits" in note for note in notes)


def test_pictures_whose_range_is_not_known_are_refused() -> None:
    for low, high in ((-1.0, 1.0), (0.0, 1000.0), (0.0, np.nan)):
        buffer = io.BytesIO()
        Image.fromarray(np.array([[low, high]], np.float32)).save(buffer, format="TIFF")
        with pytest.raises(ImageError, match="which no rule maps to 8 bits"):
            load_image(buffer.getvalue(), origin="a")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_used_and_said(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    more = {} if kind == "TIFF" else {"duration": 100}
    frames[0].save(buffer, format=kind, save_all=True, append_images=frames[1:], **more)
    notes: Counter[str] = Counter()
    image = load_image(buffer.getvalue(), origin="a", notes=notes)
    assert seen(image.data)[0, 0, 0] > 200 > seen(image.data)[0, 0, 2]
    with Image.open(io.BytesIO(image.data)) as opened:
        assert getattr(opened, "n_frames", 1) == 1
    assert notes["images of several frames, of which the first is used"] == 1


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, format="PNG")
    with pytest.raises(ImageError, match="20000 x 10000 pixels|200000000 pixels"):
        load_image(buffer.getvalue(), origin="a")


def test_five_thousand_mutated_pictures_are_a_picture_or_a_message() -> None:
    rng = random.Random(0)
    files = {kind: picture(kind, mode) for kind, mode in PICTURES.items()}
    read_well = Counter[bool]()
    for number in range(5000):
        kind = list(files)[number % len(files)]
        data = bytearray(files[kind])
        for _ in range(rng.choice((1, 2, 8, 64))):
            head = rng.random() < 0.7
            data[rng.randrange(min(200, len(data)) if head else len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        problem = ""
        try:
            seen(load_image(bytes(data), origin=f"{kind} {number}", max_pixels=10**7).data)
        except ImageError as error:
            problem = str(error)
        assert not problem or f"{kind} {number}" in problem
        read_well[not problem] += 1
    assert min(read_well.values()) > 500, read_well


VALUES: tuple[Any, ...] = (
    None, "", "a", "<image>", "<image><image>", 0, -1, 1.5, float("nan"), True, [], {}, [None],
    [[]], "a.png", ["a.png"], ["gone.png"], [["a.png"]], {"path": "a.png"}, {"bytes": "a.png"},
    [{}], [{"role": "user", "content": "a"}], {"role": "user", "content": "a"}, "\ud800", "\0",
    "[", "[{", '[{"role": 1}]', "data:image/png;base64,", "data:", "file://", "http://",
    r"\boxed{", r"\boxed{1}", "####", "#### ", "$" * 50, "{" * 50, "9" * 400, "<|im_end|>",
    "<video>", [{"type": "image"}], [{"type": None}], [{"type": "text", "text": None}],
    {"ground_truth": None}, {"ground_truth": {"a": 1}}, [1, 2], ["a", "b"], "\u2028", "½" * 10,
)  # fmt: skip


def mutated(row: Any, rng: random.Random) -> Any:
    """A row with some of its values, at any depth, replaced, removed, repeated or moved."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node: Any = row
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.6:
                node = node[key]
                continue
            change = rng.randrange(5)
            if change == 0:
                del node[key]
            elif change == 1 and isinstance(node, list):
                node.append(copy.deepcopy(node[key]))
            elif change == 2 and isinstance(node, dict):
                node[rng.choice(NAMES)] = node.pop(key)
            elif change == 3 and isinstance(node[key], str) and node[key]:
                text = node[key]
                place = rng.randrange(len(text))
                node[key] = (
                    text[:place] + chr(rng.choice((0, 34, 60, 92, 125, 0xD800))) + text[place:]
                )
            else:
                node[key] = copy.deepcopy(rng.choice(VALUES))
            break
    return row


NAMES = ("prompt", "messages", "images", "image", "answer", "response", "role", "content", "type",
         "text", "from", "value", "conversations", "videos", "problem", "system")  # fmt: skip


def use(path: Path, chat: ChatTemplate, *, way: int, need: str | None) -> None:
    """What a command does with a file: train, train, check, score."""
    source = DataSource(path=str(path))
    if way == 3:
        encode_conversations(path, chat)
    elif way == 2:
        check(source, chat=chat, method="exact", need=need)
    else:
        reading = Reading(source)
        for found in iterate(source, need=need, measure=prompt_tokens(chat), reading=reading):
            if found.error is not None:
                raise found.error
            assert found.prompt is not None
            if need == COLD:
                render(found.prompt, chat)


def test_twenty_thousand_mutated_rows_are_read_or_are_a_message(
    folder: Path, chat: ChatTemplate, capsys: pytest.CaptureFixture
) -> None:
    """In the cold start, RL, the check and ``score`` alike. The ids are the rows' own places."""
    rng = random.Random(0)
    rows = [row for _, _, row, _ in CASES if isinstance(row, dict)]
    path, outcomes = folder / "mutated.jsonl", Counter[str]()
    for number in range(20_000):
        row = mutated(rng.choice(rows), rng)
        if not isinstance(row, dict):
            continue
        if number % 4 == 3:  # score's column
            row["messages"] = row.pop("prompt", row.get("messages"))
        try:
            path.write_text(json.dumps(row) + "\n")
        except ValueError:
            continue
        problem = ""
        try:
            use(path, chat, way=number % 4, need=(RL, COLD, None)[number % 3])
            capsys.readouterr()
        except DataError as error:
            problem = str(error)
        assert not problem or str(path) in problem
        assert "cannot be read (" not in problem, (row, problem)  # a fault with no name
        outcomes["message" if problem else "read"] += 1
    assert min(outcomes["read"], outcomes["message"]) > 3000, outcomes


def test_the_settings_know_every_format() -> None:
    assert ("auto", "columns", *FORMATS) == SOURCE_FORMATS
