"""Data files: both formats, all ways to give an image, and every way a row can be wrong."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import ExifTags, Image

from ovr_fast.config import DataSource
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.check import check
from ovr_fast.data.errors import DataError
from ovr_fast.data.images import load_image
from ovr_fast.data.prompts import Mixture, read_source
from ovr_fast.shape.model_shape import read_shape
from support.toy_run import BASE_MODEL


def png(colour: str = "red", size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write_jsonl(path: Path, rows: list) -> DataSource:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return DataSource(path=str(path))


def test_images_as_paths_bytes_and_hugging_face_records(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "images": ["a.png"], "answer": 1}])
    table = pa.table(
        {
            "prompt": ["p", "p"],
            "images": [[{"bytes": png(), "path": None}], [{"bytes": None, "path": "a.png"}]],
            "answer": ["1", "2"],
        }
    )
    parquet.write_table(table, tmp_path / "b.parquet")
    raw = pa.table({"prompt": ["p"], "images": [png()], "answer": ["1"]})
    parquet.write_table(raw, tmp_path / "c.parquet")
    prompts = read_source(jsonl, need="answer")
    for name in ("b", "c"):
        source = DataSource(path=str(tmp_path / f"{name}.parquet"))
        prompts += read_source(source, need="answer")
    assert len({prompt.images[0].digest for prompt in prompts}) == 1
    assert [prompt.answer for prompt in prompts] == ["1", "1", "2", "1"]


@pytest.mark.parametrize("several", [True, False])
def test_dataset_folders_give_the_images_bytes(
    tmp_path: Path, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    image = datasets.Image()
    columns = {
        "prompt": datasets.Value("string"),
        "images": datasets.List(image) if several else image,
        "answer": datasets.Value("string"),
    }
    item = {"bytes": png(), "path": None}
    rows = {"prompt": ["p"], "images": [[item] if several else item], "answer": ["1"]}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    made.to_parquet(tmp_path / "files" / "train.parquet")
    original = hashlib.sha256(png()).hexdigest()
    for name in ("saved", "splits", "files"):
        (prompt,) = read_source(DataSource(path=str(tmp_path / name)), need="answer")
        assert [p.digest for p in prompt.images] == [original]
        assert prompt.messages[0]["content"][0] == {"type": "image"}


def test_turned_and_transparent_images_are_written_anew_upright_on_white() -> None:
    plain = load_image(png(), origin="plain")
    assert plain.data == png()
    clear = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 15, 20))
    buffer = io.BytesIO()
    clear.save(buffer, format="PNG")
    with Image.open(io.BytesIO(load_image(buffer.getvalue(), origin="a").data)) as seen:
        assert (seen.mode, seen.getpixel((3, 3)), seen.getpixel((25, 3))) == (
            "RGB", (255, 0, 0), (255, 255, 255),
        )  # fmt: skip
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, format="JPEG", exif=exif)
    with Image.open(io.BytesIO(load_image(buffer.getvalue(), origin="a").data)) as seen:
        assert seen.size == (20, 30)
        assert seen.getexif().get(ExifTags.Base.Orientation, 1) == 1


def test_images_on_disk_are_read_when_needed_and_may_not_change(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "images": ["a.png"]}])
    (prompt,) = read_source(source, need=None)
    (image,) = prompt.images
    assert image.stored == tmp_path / "a.png"
    assert image.data == png()
    (tmp_path / "a.png").write_bytes(png("blue"))
    with pytest.raises(ValueError, match="a.png.*has changed since the run began"):
        _ = image.data
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="No such file or directory since the run began"):
        _ = image.data


def test_check_reads_on_after_bad_rows_and_names_each_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    good = {"prompt": "p", "images": ["a.png"], "answer": "1"}
    rows = ["not json", good, good, {**good, "images": ["none.png"]}, {"answer": "1"}, "[]"]
    rows += [{"prompt": "a literal <|image_pad|>", "answer": "1"}, {**good, "prompt": "q"}]
    source = write_jsonl(tmp_path / "images.jsonl", rows)
    chat = ChatTemplate(BASE_MODEL, image_token_id=read_shape(BASE_MODEL).image_token_id)
    assert not check(source, chat=chat, method="exact")
    said = capsys.readouterr().out
    for line in ("4 x malformed row", "1 x broken or missing image", "1 x duplicate prompt"):
        assert line in said, said


def test_columns_are_settings_and_marks_place_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png("blue"))
    rows = [{"q": "first <image> then <image>?", "pics": ["a.png", "b.png"], "gold": "x"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows).path
    source = DataSource(path=path, prompt="q", images="pics", answer="gold")
    (prompt,) = read_source(source, need="answer")
    kinds = [part["type"] for part in prompt.messages[0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]


def test_without_marks_images_come_first_and_chat_messages_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": chat, "images": "a.png", "answer": "1"}])
    (prompt,) = read_source(source, need="answer")
    assert prompt.messages[0] == {"role": "system", "content": "s"}
    assert [part["type"] for part in prompt.messages[1]["content"]] == ["image", "text"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', "bad.jsonl:2: not JSON"),
        ("[1, 2]", "bad.jsonl:2: a list, not an object"),
        ({"question": "p"}, "bad.jsonl:2: no column 'prompt' (it has ['question'])"),
        ({"prompt": "p"}, "bad.jsonl:2: no answer in column 'answer'"),
        ({"prompt": "p", "answer": "1", "images": ["gone.png"]}, "gone.png: No such file"),
        ({"prompt": "p", "answer": "1", "images": ["broken.png"]}, "broken image"),
        ({"prompt": "p", "answer": "1", "images": [3]}, "neither a path nor bytes"),
        ({"prompt": "<image> <image>", "answer": "1", "images": ["ok.png"]}, "2 image places"),
        ({"prompt": 5, "answer": "1"}, "neither text nor a list of chat messages"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path: Path, row, message: str) -> None:
    (tmp_path / "ok.png").write_bytes(png())
    (tmp_path / "broken.png").write_bytes(png()[:60])
    source = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p", "answer": "1"}, row])
    with pytest.raises(DataError) as caught:
        read_source(source, need="answer")
    assert message in str(caught.value)


def test_missing_empty_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_source(DataSource(path=str(tmp_path / "no.jsonl")), need=None)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_source(DataSource(path=str(tmp_path / "empty.jsonl")), need=None)
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_source(DataSource(path=str(tmp_path / "x.parquet")), need=None)


def test_a_mixture_follows_its_weights_and_continues_from_its_state(tmp_path: Path) -> None:
    rows = [[{"id": f"{name}{i}", "prompt": "p"} for i in range(5)] for name in "ab"]
    pools = [
        read_source(write_jsonl(tmp_path / f"{i}.jsonl", r), need=None) for i, r in enumerate(rows)
    ]
    stream = Mixture(pools, [3.0, 1.0], seed=1)
    first = [p.id for p in stream.take(20)]
    assert sum(name.startswith("a") for name in first) == 15
    assert len(set(first[:6])) == 6  # nothing twice within a pass over a source
    state = stream.state()
    rest = [p.id for p in stream.take(9)]
    again = Mixture(pools, [3.0, 1.0], seed=1)
    again.restore(state)
    assert [p.id for p in again.take(9)] == rest
    assert [p.id for p in Mixture(pools, [3.0, 1.0], seed=2).take(20)] != first


def test_a_image_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png())
    rows = [{"prompt": "p", "images": [name]} for name in ("a.png", "b.png")]
    one, two = read_source(write_jsonl(tmp_path / "a.jsonl", rows), need=None)
    assert one.images[0].digest == two.images[0].digest
