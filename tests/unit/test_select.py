"""Converting files to our own, and choosing rows of them."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ovr_fast.config import DataSource
from ovr_fast.data import convert, select
from ovr_fast.data.prompts import Reading, read
from ovr_fast.data.rollouts import write_rollouts
from ovr_fast.records import Prompt, Rollout, RolloutBatch, VersionSpan
from support.row_cases import CASES, png
from support.toy_run import BASE_MODEL


def run(monkeypatch: pytest.MonkeyPatch, module, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    module.main()


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_row_of_the_table_converts_to_itself(tmp_path: Path) -> None:
    """All formats, one file of our own: the same messages, pixels, answers and responses."""
    (tmp_path / "a.png").write_bytes(png())
    for number, (why, need, row, expected) in enumerate(CASES):
        if expected.startswith("!"):
            continue
        source = DataSource(path=str(write(tmp_path / f"{number}.jsonl", [row])))
        output = tmp_path / f"{number}.parquet"
        convert.write_prompts(convert.prompts_of([Reading(source)], need), output)
        (before,), _, _ = read(source, need=need)
        (after,), _, reading = read(replace(source, path=str(output)), need=need)
        assert after.messages == before.messages, why
        assert (after.answer, after.response) == (before.answer, before.response), why
        assert [i.digest for i in after.images] == [i.digest for i in before.images], why
        assert "format columns" in reading.describe()


def test_the_convert_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"question": "a", "answer": "#### 3"}, {"question": "b", "answer": ""}]
    path, output = write(tmp_path / "a.jsonl", rows), tmp_path / "new.parquet"
    with pytest.raises(SystemExit, match=r"convert: .*a.jsonl:2: the answer '' can never"):
        run(monkeypatch, convert, str(path), "--output", str(output), "--for", "rl")
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    run(monkeypatch, convert, str(path), "--output", str(output), "--for", "rl", "--drop")
    said = capsys.readouterr().out
    assert "2 rows; format question (it has question)" in said
    assert "1 dropped" in said
    assert f"{output}: 1 rows" in said
    assert parquet.read_table(output).num_rows == 1
    with pytest.raises(SystemExit, match="exists; remove it"):
        run(monkeypatch, convert, str(path), "--output", str(output))


def picture(path: Path, seed: int, *, quality: int = 90) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 80)).save(path, quality=quality)


def record(folder: Path, source: str, rates: dict[str, tuple[int, int]]) -> None:
    """A recorded step: of each prompt so many correct samples of so many."""
    prompts, rollouts = [], []
    for index, (name, (right, count)) in enumerate(rates.items()):
        prompts.append(
            Prompt(id=name, data_source=source, messages=(), images=(), answer="1", response=None)
        )
        rollouts += [
            Rollout(
                prompt_index=index, sample_index=n, prompt_tokens=np.ones(1, np.int64),
                response_tokens=np.ones(1, np.int64), rollout_logprobs=np.zeros(1, np.float32),
                text="", finish_reason="stop", versions=(VersionSpan(0, 0),),
                reward=float(n < right), outcome="correct" if n < right else "wrong",
            )
            for n in range(count)
        ]  # fmt: skip
    batch = RolloutBatch(step=1, prompts=tuple(prompts), rollouts=tuple(rollouts))
    write_rollouts(folder / "000001.parquet", batch)


def kept(output: Path) -> list[str]:
    return [row["id"] for row in parquet.read_table(output).to_pylist()]


def test_rows_are_chosen_for_each_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    for name, seed in (("a.jpg", 0), ("b.jpg", 1)):
        picture(tmp_path / name, seed)
    picture(tmp_path / "a2.jpg", 0, quality=60)  # the same picture, saved anew
    rows = [
        {"id": "easy", "prompt": "q easy", "answer": "1"},
        {"id": "hard", "prompt": "q hard", "answer": "1"},
        {"id": "good", "prompt": "q good", "answer": "1"},
        {"id": "never sampled", "prompt": "q never", "answer": "1"},
        {"id": "long", "prompt": "red " * 200, "answer": "1"},
        {"id": "first", "prompt": f"{long} a", "answer": "1"},
        {"id": "again", "prompt": f"{long.upper()}  A", "answer": "1"},
        {"id": "benchmark", "prompt": "what is seen here", "answer": "1"},
        {"id": "picture", "prompt": "How many?", "images": ["a.jpg"], "answer": "1"},
        {"id": "picture again", "prompt": "How many?", "images": ["a2.jpg"], "answer": "1"},
        {"id": "other picture", "prompt": "How many?", "images": ["b.jpg"], "answer": "1"},
        {"id": "no answer", "prompt": "q none", "response": "b"},
    ]
    path = write(tmp_path / "data.jsonl", rows)
    bench = write(
        tmp_path / "bench.jsonl", [{"question": "What is seen  here", "answer": ["2", "3"]}]
    )
    record(tmp_path / "rollouts", "data", {"easy": (8, 8), "hard": (0, 8), "good": (4, 8)})
    output = tmp_path / "new.parquet"
    run(
        monkeypatch, select, str(path), "--output", str(output), "--against", str(bench),
        "--pass-rate", str(tmp_path / "rollouts"), "--tokens", ":100", "--model", str(BASE_MODEL),
        "--method", "exact",
    )  # fmt: skip
    assert kept(output) == ["good", "never sampled", "first", "picture", "other picture"]
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert (report["rows"], report["kept"]) == (12, 5)
    assert report["gone"] == {
        "too easy": ["easy: 8 of 8"],
        "too hard": ["hard: 0 of 8"],
        "length": [f"long: {report['gone']['length'][0].split(': ')[1]}"],
        "repeated": ["again: first", "picture again: picture"],
        "in another file": [f"benchmark: {bench}:1"],
        "no answer": ["no answer"],
    }
    assert report["by_source"]["data"]["kept"] == 5
    assert "kept 5 of 12 rows" in capsys.readouterr().out


def test_bounds_of_one_source_and_of_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": n, "prompt": f"q {n}", "answer": "1"} for n in "ab"]
    path = write(tmp_path / "data.jsonl", rows)
    record(tmp_path / "rollouts", "data", {"a": (8, 8), "b": (0, 8)})
    output = tmp_path / "new.parquet"
    words = [str(path), "--output", str(output), "--pass-rate", str(tmp_path / "rollouts")]
    run(monkeypatch, select, *words, "--keep", "0.1:0.9", "data=0.5:")
    assert kept(output) == ["a"]
    output.unlink()
    scored = [{"token_ids": [1, 2], "logprobs": [None, -loss]} for loss in (0.5, 4.0)]
    write(tmp_path / "scored.jsonl", scored)
    words = [str(path), "--output", str(output), "--loss", str(tmp_path / "scored.jsonl")]
    run(monkeypatch, select, *words, "--keep-loss", ":3")
    assert kept(output) == ["a"]
    output.unlink()
    write(tmp_path / "scored.jsonl", [{"x": 1}])
    with pytest.raises(SystemExit, match=r"scored.jsonl: not what ovr_fast.score writes"):
        run(monkeypatch, select, *words)
    assert not output.exists()


def test_instructions_do_not_make_rows_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    end = "Please reason step by step, and put your final answer within a box, as a whole number."
    rows = [{"id": n, "prompt": f"What is {n} {sign} {n + 3}? {end}", "answer": n}
            for n, sign in enumerate("+-*" * 20)]  # fmt: skip
    path = write(tmp_path / "data.jsonl", rows)
    bench = write(tmp_path / "bench.jsonl", [
        {"question": f"Who wrote book {n} about things? {end}", "answer": n} for n in range(60)
    ])  # fmt: skip
    output = tmp_path / "new.parquet"
    run(monkeypatch, select, str(path), "--output", str(output), "--against", str(bench))
    assert len(kept(output)) == 60
    output.unlink()
    record(tmp_path / "rollouts", "other", {"0": (1, 1)})
    words = [str(path), "--output", str(output), "--pass-rate", str(tmp_path / "rollouts")]
    run(monkeypatch, select, *words)
    assert "60 rows are in no recorded rollout" in capsys.readouterr().out
    output.unlink()
    for keep, message in (("foo", "--keep foo: not"), ("goe=0:1", "names 'goe', which no")):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, select, *words, "--keep", keep)


def test_pictures_saved_anew_are_alike_and_others_are_not() -> None:
    def data(seed: int, quality: int) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 80)).save(buffer, format="JPEG", quality=quality)
        return buffer.getvalue()

    from ovr_fast.data.images import load_image

    one = [select.difference_hash(load_image(data(n, 90), origin="a")) for n in range(20)]
    two = [select.difference_hash(load_image(data(n, 50), origin="b")) for n in range(20)]
    apart = np.array([[(a ^ b).bit_count() for b in two] for a in one])
    assert apart.diagonal().max() <= select.HASH_BITS_APART
    assert (apart + 64 * np.eye(20, dtype=int)).min() > 2 * select.HASH_BITS_APART
