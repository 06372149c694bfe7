"""Benchmarks: shapes and traps of the official files, scoring, errors, records, bad input."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ovr_fast import evaluate
from ovr_fast.config import DataSource, load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.streams import RunData
from ovr_fast.evaluation import contamination, results, statistics
from ovr_fast.evaluation.adapter import EvaluationError, load_adapter, shipped
from ovr_fast.evaluation.extraction import extract
from ovr_fast.evaluation.heldout import HeldOut
from ovr_fast.evaluation.in_training import read_benchmarks
from ovr_fast.evaluation.judge import parse
from ovr_fast.evaluation.protocol import Protocol, prompt_parts, prompt_text, sample_seed
from ovr_fast.evaluation.question import Benchmark, Question, load_benchmark
from ovr_fast.evaluation.records import (
    Appender,
    ResponseRecord,
    ScoreRecord,
    check_manifest,
    read_records,
    write_records,
    write_whole,
)
from ovr_fast.evaluation.scoring import is_number, rule, said_letters, score_responses
from ovr_fast.observe.meanings import meaning_of
from ovr_fast.records import Prompt, Response, VersionSpan
from ovr_fast.rl.rewards import Verifier
from ovr_fast.rollout import serve
from ovr_fast.settings import ConfigError
from ovr_fast.shape.model_shape import read_shape
from ovr_fast.toy import benchmarks
from support.toy_run import BASE_MODEL, ROOT
from unit.test_fleet import OneRank


def png(color: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


PICTURE = {"bytes": png(), "path": None}


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def adapter(name: str, rows: int) -> Any:
    return msgspec.structs.replace(load_adapter(name), rows=rows)


def load(name: str, data: Path, rows: int) -> tuple[Benchmark, list[Question]]:
    benchmark = load_benchmark(adapter(name, rows), data)
    return benchmark, list(benchmark.questions)


def test_every_shipped_adapter_is_one() -> None:
    names = shipped()
    assert len(names) >= 35
    for name in names:
        found = load_adapter(name)
        assert found.name == name
        assert found.rows > 0
        assert found.source
        assert found.instruction is None or found.kind == "graded"


def test_mathvision(tmp_path: Path) -> None:
    """One merged picture for several marks; options of bare letters; numbers to two decimals."""
    base = {"decoded_image": PICTURE, "image": "images/1.jpg", "subject": "algebra", "level": 2}
    table(tmp_path / "MathVision/data/testmini-00000-of-00001.parquet", [
        {"id": "4", "question": "Which?\n<image1> or <image2>", "options": ["A", "B", "C"],
         "answer": "B", **base},
        {"id": "5", "question": "How many? <image1>", "options": [], "answer": "3.14159", **base},
        {"id": "6", "question": "<image1> Which?", "options": ["12", "7", "1/2"], "answer": "C",
         **base},
    ])  # fmt: skip
    benchmark, (letters, free, choice) = load("mathvision_mini", tmp_path, 3)
    assert (letters.kind, letters.answer, len(letters.images)) == ("choice", "B", 1)
    assert "<image" not in letters.text
    assert (free.kind, choice.answer) == ("math", "C")
    assert rule("3.14", free).outcome == "correct"
    assert rule("0.5", choice).outcome == "correct"  # a value that one option alone has
    assert rule(r"\text{(C)}", choice).outcome == "correct"
    assert rule("7", choice).outcome == "wrong"
    assert prompt_text(choice, benchmark.adapter, "ours").splitlines()[1:] == [
        "A. 12", "B. 7", "C. 1/2", "Put the letter of your choice into \\boxed{}."
    ]  # fmt: skip
    assert prompt_parts(choice, benchmark.adapter, "ours")[0] == 0


def test_mathverse(tmp_path: Path) -> None:
    """Versions of a problem; an empty question; answers that are no letter."""
    rows = [
        {"sample_index": str(i), "problem_index": "1", "problem_version": version,
         "question": "" if version == "Vision Only" else "Find x.\nChoices:\nA:1\nB:2",
         "image": PICTURE, "answer": answer, "question_type": kind,
         "query_cot": "Please think. Find x.", "metadata": {"subject": "Plane Geometry"}}
        for i, (version, answer, kind) in enumerate([
            ("Vision Only", "(C)", "multi-choice"), ("Vision Only", "False", "multi-choice"),
            ("Vision Only", "C\nD", "multi-choice"), ("Vision Only", "30 cm", "free-form"),
            ("Text Lite", "A", "multi-choice"),
        ])
    ]  # fmt: skip
    (tmp_path / "MathVerse").mkdir()
    table(tmp_path / "MathVerse/testmini.parquet", rows)
    benchmark, found = load("mathverse_vision_only", tmp_path, 4)
    assert [q.answer for q in found] == ["C", "False", "CD", "30 cm"]
    assert {q.cluster for q in found} == {"1"}
    assert found[0].groups == (("metadata.subject", "Plane Geometry"),)
    assert prompt_text(found[0], benchmark.adapter, "official") == "Please think. Find x."
    assert prompt_text(found[0], benchmark.adapter, "ours").startswith("Put the letter")
    assert rule("False", found[1]).outcome == "correct"
    assert rule("D, C", found[2]).outcome == "correct"
    assert rule("C", found[2]).outcome == "wrong"
    assert load("mathverse_text_lite", tmp_path, 1)[1][0].kind == "choice"


def test_mathvista(tmp_path: Path) -> None:
    """A file that maps names to rows; precision by row; lists; pictures beside the file."""
    (tmp_path / "MathVista/images").mkdir(parents=True)
    (tmp_path / "MathVista/images/1.png").write_bytes(png())
    base = {"image": "images/1.png", "query": "Hint: ...", "unit": None,
            "metadata": {"task": "VQA", "source": "IQTest"}}  # fmt: skip
    rows = {
        "1": {"pid": "1", "question": "How much?", "choices": None, "precision": 1.0,
              "answer": "1.2", "answer_type": "float", **base},
        "2": {"pid": "2", "question": "Which?", "choices": ["yes", "no"], "precision": None,
              "answer": "no", "answer_type": "text", **base},
        "3": {"pid": "3", "question": "List.", "choices": None, "precision": None,
              "answer": "[0, 2]", "answer_type": "list", **base},
        "4": {"pid": "4", "question": "How many?", "choices": None, "precision": None,
              "answer": "1,300", "answer_type": "integer", **base},
    }  # fmt: skip
    (tmp_path / "MathVista/testmini.json").write_text(json.dumps(rows))
    _, (real, choice, listed, whole) = load("mathvista", tmp_path, 4)
    assert rule("1.23", real).outcome == "correct"
    assert rule("1.26", real).outcome == "wrong"
    assert choice.answer == "B"
    assert rule("no", choice).outcome == "correct"
    assert rule("(0, 2)", listed).outcome == rule("[0,2]", listed).outcome == "correct"
    assert rule("[0, 3]", listed).outcome == "wrong"
    assert rule("1300", whole).outcome == rule("1,300", whole).outcome == "correct"
    assert len(real.images) == 1


def test_dynamath_counts_the_worst_variant(tmp_path: Path) -> None:
    for variant in range(1, 11):
        table(tmp_path / f"DynaMath/data/sample{variant}-00000-of-00001.parquet", [
            {"id": "1", "question": "q", "decoded_image": PICTURE, "ground_truth": "2.5",
             "answer_type": "float", "subject": "algebra"},
            {"id": "2", "question": "q", "decoded_image": PICTURE, "ground_truth": "B",
             "answer_type": "multiple choice", "subject": "algebra"},
        ])  # fmt: skip
    benchmark, found = load("dynamath", tmp_path, 20)
    assert [q.variant for q in found[:4]] == ["1", "1", "2", "2"]
    assert rule("2.5009", found[0]).outcome == "correct"
    assert rule("2.502", found[0]).outcome == "wrong"
    right = {q.id: [1.0] for q in found} | {"1/7": [0.0]}
    assert results.estimate(benchmark, right)["score"].value == 0.5
    assert results.estimate(benchmark, right)["average"].value == pytest.approx(0.95)


def test_wemath_is_strict_and_loose(tmp_path: Path) -> None:
    keys = ["2steps_1", "2steps_2", "2steps_multi"]
    table(tmp_path / "We-Math/testmini-00000.parquet", [
        {"ID": str(i), "key": key, "question": "q", "option": "A. one;B. two; C. No, three",
         "answer": "C", "image_path": PICTURE}
        for i in range(4) for key in keys
    ])  # fmt: skip
    benchmark, found = load("wemath", tmp_path, 12)
    assert found[0].options == ("one", "two", "No, three")
    table(tmp_path / "letters/We-Math/testmini-00000.parquet", [
        {"ID": "1", "key": key, "question": "q", "option": "A. B;B. C;C. D;D. E", "answer": "D",
         "image_path": PICTURE}
        for key in keys
    ])  # fmt: skip
    assert {q.answer for q in load("wemath", tmp_path / "letters", 3)[1]} == {"D"}
    (tmp_path / "letters/We-Math/testmini.json").write_text("[]")  # the same rows once more
    load("wemath", tmp_path / "letters", 3)
    whole = load_benchmark(adapter("wemath", 12), tmp_path, limit=4)
    assert [q.cluster for q in whole.questions] == ["0"] * 3 + ["1"] * 3
    #        all right      composite wrong   one step wrong    all wrong
    worth = [(1, 1, 1), (1, 1, 0), (0, 1, 1), (0, 0, 0)]
    marks = {
        f"{i}/{key}": [float(worth[i][j])] for i in range(4) for j, key in enumerate(keys)
    }  # fmt: skip
    estimate = results.estimate(benchmark, marks)
    assert estimate["score"].value == (1 + 0.5) / 4
    assert estimate["loose"].value == (2 + 0.5) / 4


def test_logicvista_leaves_out_what_has_no_question(tmp_path: Path) -> None:
    folder = tmp_path / "LogicVista/data"
    folder.mkdir(parents=True)
    (folder / "images").mkdir()
    (folder / "images/1.png").write_bytes(png())
    (folder / "dataset.json").write_text(json.dumps({
        "v1_1": {"imagename": "1.png", "question": "Which two?", "answer": "A, D"},
        "v1_382": {"imagename": "1.png", "question": "", "answer": ""},
        "v1_383": {"imagename": "1.png", "question": "Which?", "answer": "3"},
    }))  # fmt: skip
    _, (two, odd) = load("logicvista", tmp_path, 2)
    assert len(two.images) == 1
    assert (two.id, two.answer, odd.answer) == ("v1_1", "AD", "3")
    assert rule("D and A", two).outcome == "correct"
    assert rule("3", odd).outcome == "correct"


def test_mmmu_pro_binds_marks_to_columns(tmp_path: Path) -> None:
    blue = {"bytes": png("blue"), "path": None}
    row = {
        "id": "a", "question": "Compare <image 2> with <image 1>.", "answer": "B",
        "options": "['<image 3>', 'none of \\'them\\'', \"both\"]", "subject": "Art",
        "image_1": PICTURE, "image_2": blue, "image_3": {"bytes": png("green"), "path": None},
    } | {f"image_{i}": None for i in range(4, 8)}  # fmt: skip
    table(tmp_path / "MMMU_Pro/standard10.parquet", [row])
    benchmark, (found,) = load("mmmu_pro_standard", tmp_path, 1)
    assert found.options[1:] == ("none of 'them'", "both")
    parts = prompt_parts(found, benchmark.adapter, "ours")
    assert parts[:4] == ["Compare ", 1, " with ", 0]
    assert parts[5] == 2
    bad = row | {"question": "See <image 6>."}
    table(tmp_path / "MMMU_Pro/standard10.parquet", [bad])
    with pytest.raises(EvaluationError, match="no picture for <image 6>"):
        load("mmmu_pro_standard", tmp_path, 1)


def test_gpqa_orders_options_by_its_name(tmp_path: Path) -> None:
    columns = ["Record ID", "Question", "Correct Answer", "Incorrect Answer 1",
               "Incorrect Answer 2", "Incorrect Answer 3", "High-level domain"]  # fmt: skip
    rows = [[f"rec{i}", "Why?", "right", "w1", "w2", "w3", "Physics"] for i in range(40)]
    with open(tmp_path / "gpqa_diamond.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    _, found = load("gpqa_diamond", tmp_path, 40)
    for question in found:
        assert question.options["ABCD".index(question.answer)] == "right"
    assert {question.answer for question in found} == set("ABCD")
    assert found == load("gpqa_diamond", tmp_path, 40)[1]
    assert rule("right", found[0]).outcome == "correct"


def test_text_sets(tmp_path: Path) -> None:
    (tmp_path / "MATH-500").mkdir()
    (tmp_path / "MATH-500/test.jsonl").write_text(json.dumps(
        {"problem": "x?", "answer": "\\frac{1}{2}", "unique_id": "a", "level": 1, "subject": "s"}
    ) + "\n")  # fmt: skip
    assert load("math500", tmp_path, 1)[1][0].kind == "math"
    (tmp_path / "aime24.jsonl").write_text(json.dumps(
        {"id": 60, "problem": "x?", "answer": "033"}) + "\n")  # fmt: skip
    (aime,) = load("aime24", tmp_path, 1)[1]
    assert is_number("33", aime)
    (tmp_path / "mmlu_test.jsonl").write_text(json.dumps(
        {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "law"}
    ) + "\n")  # fmt: skip
    assert load("mmlu", tmp_path, 1)[1][0].answer == "C"
    (tmp_path / "mmlu_pro_test.jsonl").write_text(json.dumps(
        {"question_id": 1, "question": "q", "options": ["a", "b", "N/A"], "answer": "B",
         "category": "law"}) + "\n")  # fmt: skip
    assert load("mmlu_pro", tmp_path, 1)[1][0].options == ("a", "b")


def test_hallusionbench_is_the_mean_of_three_accuracies(tmp_path: Path) -> None:
    """Two sets of two figures with two questions each; the answers are 1 and 0."""
    table(tmp_path / "HallusionBench/image-0.parquet", [
        {"category": "VD", "subcategory": "math", "set_id": str(s), "figure_id": str(f),
         "question_id": str(q), "question": "Is it longer?", "image": PICTURE, "visual_input": "1",
         "gt_answer": str((f + q) % 2)}
        for s in range(2) for f in range(2) for q in range(2)
    ])  # fmt: skip
    benchmark, found = load("hallusionbench", tmp_path, 8)
    assert [q.answer for q in found[:3]] == ["no", "yes", "yes"]
    assert rule("No", found[0]).outcome == "correct"
    worth = {q.id: [1.0] for q in found}
    worth["VD/math/0/0/1"] = [0.0]
    # 7 of 8 questions, 3 of 4 figures, 3 of 4 questions over their figures.
    value = results.estimate(benchmark, worth)["score"].value
    assert value == pytest.approx((7 / 8 + 3 / 4 + 3 / 4) / 3)


def test_mme_is_a_sum_over_tasks_and_its_perception_a_part(tmp_path: Path) -> None:
    table(tmp_path / "MME/data/test-0.parquet", [
        {"question_id": f"{task}/{n}.png", "question": f"Is it {answer}? Please answer yes or no.",
         "image": PICTURE, "answer": answer, "category": task}
        for task in ("OCR", "count", "code_reasoning") for n in range(2) for answer in ("Yes", "No")
    ])  # fmt: skip
    benchmark, found = load("mme", tmp_path, 12)
    worth = {q.id: [1.0] for q in found}
    assert results.estimate(benchmark, worth)["score"].value == pytest.approx(600)
    worth[found[0].id] = [0.0]  # of two pictures of OCR: 3 of 4 questions, 1 of 2 pairs
    assert results.estimate(benchmark, worth)["score"].value == pytest.approx(400 + 75 + 50)
    part, some = load("mme_perception", tmp_path, 8)
    assert {dict(q.groups)["category"] for q in some} == {"OCR", "count"}
    worth = {q.id: [1.0] for q in some}
    assert results.estimate(part, worth)["score"].value == pytest.approx(400)


def test_blink_has_several_pictures_and_folders(tmp_path: Path) -> None:
    for task in ("Counting", "Jigsaw"):
        table(tmp_path / f"BLINK/{task}/val-00000-of-00001.parquet", [
            {"idx": f"val_{task}_1", "sub_task": task, "question": "Which one?",
             "prompt": "Which one? (A) the first (B) the second",
             "choices": ["the first", "the second"],
             "image_1": PICTURE, "image_2": PICTURE, "image_3": None, "image_4": None,
             "answer": "(B)"}
        ])  # fmt: skip
    _, found = load("blink", tmp_path, 2)
    assert [len(q.images) for q in found] == [2, 2]
    assert {q.answer for q in found} == {"B"}
    assert rule("(B)", found[0]).outcome == "correct"


def test_mmbench_is_right_in_every_rotation(tmp_path: Path) -> None:
    """OpenCompass' TSV: rotations have their question's number plus millions, and name the row
    whose picture is theirs; pandas writes "nan" where nothing is."""
    rows = [
        {"index": "7", "hint": "nan", "question": "Which?", "A": "x", "B": "y", "C": "nan",
         "D": "", "answer": "A", "category": "c", "image": base64.b64encode(png()).decode()},
        {"index": "1000007", "hint": "nan", "question": "Which?", "A": "y", "B": "x", "C": "nan",
         "D": "", "answer": "B", "category": "c", "image": "7"},
        {"index": "8", "hint": "Look.", "question": "Is it?", "A": "no", "B": "yes", "C": "",
         "D": "", "answer": "B", "category": "d", "image": base64.b64encode(png()).decode()},
    ]  # fmt: skip
    path = tmp_path / "MMBench/MMBench_DEV_EN.tsv"
    path.parent.mkdir()
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    benchmark, found = load("mmbench_en", tmp_path, 3)
    assert [q.cluster for q in found] == ["7", "7", "8"]
    assert [q.options for q in found] == [("x", "y"), ("y", "x"), ("no", "yes")]
    assert [q.text for q in found] == ["Which?", "Which?", "Look.\nIs it?"]
    assert [len(q.images) for q in found] == [1, 1, 1]
    worth = {"7": [1.0], "1000007": [0.0], "8": [1.0]}
    numbers = results.estimate(benchmark, worth)
    assert (numbers["score"].value, numbers["average"].value) == (0.5, 0.75)


def test_mmvet_is_graded_by_capability(tmp_path: Path) -> None:
    table(tmp_path / "MMVet/data/test-00000-of-00001.parquet", [
        {"question_id": f"v1_{i}", "image": PICTURE, "question": "What is x?", "image_source": "i",
         "answer": "-1<AND>-5", "capability": capability}
        for i, capability in enumerate(["ocr,math", "rec"])
    ])  # fmt: skip
    benchmark, found = load("mmvet", tmp_path, 2)
    assert found[0].groups == (("capability", "ocr"), ("capability", "math"))
    assert prompt_text(found[0], benchmark.adapter, "ours") == "What is x?"
    answers = [record(q.id, "It is -1, or so.") for q in found]
    (first, second) = score_responses({q.id: q for q in found}, answers)
    assert first.outcome == "undecided"  # a judge alone says, also where no answer is marked
    graded = msgspec.structs.replace(first, outcome="graded", credit=0.5, rule="judge")
    wrong = msgspec.structs.replace(second, outcome="wrong", rule="judge")
    made = results.summarize(benchmark, answers, [graded, wrong])
    assert made["score"]["value"] == 0.25
    assert made["groups"]["capability"]["math"] == {"score": 0.5, "questions": 1}


def test_charxiv_descriptive_asks_what_its_rubric_says(tmp_path: Path) -> None:
    path = tmp_path / "CharXiv/CharXiv_descriptive_val.tsv"
    path.parent.mkdir()
    picture = base64.b64encode(png()).decode()
    path.write_text(
        "index\timage\tquestion\tanswer\tqid\tgrading_query\n"
        f'0\t{picture}\tIts title?\tLoss\t1\t"T1: Loss, said {{PREDICTION}}, JSON {{""score""}}"\n'
        "1\t0\tIts x label?\tNot Applicable\t2\tT1: {PREDICTION}\n"
    )
    _, found = load("charxiv_descriptive", tmp_path, 2)
    assert [len(q.images) for q in found] == [1, 1]
    assert found[0].rubric == 'T1: Loss, said {PREDICTION}, JSON {"score"}'
    path.write_text(path.read_text().replace("T1: {PREDICTION}", "T1:"))
    with pytest.raises(EvaluationError, match=r"grading_query does not hold \{PREDICTION\}"):
        load("charxiv_descriptive", tmp_path, 2)


def test_phyx_is_open_or_a_choice(tmp_path: Path) -> None:
    folder = tmp_path / "PhyX/data_tsv_vlmevalkit"
    folder.mkdir(parents=True)
    picture = base64.b64encode(png()).decode()
    for kind, answer in (("MC", "B"), ("OE", "3 m/s")):
        (folder / f"PhyX_mini_{kind}.tsv").write_text(
            "index\timage\tquestion\tanswer\tcategory\n"
            f"1\t{picture}\tHow fast?\t{answer}\tMechanics\n"
        )
    _, (choice,) = load("phyx_mini_mc", tmp_path, 1)
    assert (choice.kind, rule("B", choice).outcome, rule("(C)", choice).outcome) == (
        "choice", "correct", "wrong",
    )  # fmt: skip
    _, (free,) = load("phyx_mini_oe", tmp_path, 1)
    assert rule("3 m/s", free).outcome == "correct"
    assert rule("three metres a second", free).outcome == "undecided"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_interval_of_all_alike_has_a_width(value: float) -> None:
    """None right of 60: the truth may be 4 %, as by the rule of three."""
    for found in (
        statistics.mean([value] * 60, list(range(60))),
        statistics.bootstrap(lambda drawn: value, 60),
    ):
        assert (found.value, found.error) == (value, 0.0)
        assert found.high - found.low == pytest.approx(0.041, abs=2e-3)
        assert found.low <= value <= found.high
    same = statistics.paired([value] * 60, [value] * 60, list(range(60)))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_a_protocol_keeps_its_hash() -> None:
    """A field that an adapter does not use changes nothing; this moves where a score would."""
    assert Protocol().digest(load_adapter("mathvision_mini")) == "fb6cd4d2260d"


def test_a_code_without_a_meaning_is_an_error(tmp_path: Path) -> None:
    table(tmp_path / "HallusionBench/image-0.parquet", [
        {"category": "VD", "subcategory": "m", "set_id": "0", "figure_id": "0", "question_id": "0",
         "question": "q", "image": PICTURE, "gt_answer": "1.0"}
    ])  # fmt: skip
    with pytest.raises(EvaluationError, match=r"answer '1.0' is none of 1, 0"):
        load("hallusionbench", tmp_path, 1)


def test_pope_is_f1(tmp_path: Path) -> None:
    table(tmp_path / "POPE/test.parquet", [
        {"id": str(i), "question": "Is there a dog?", "image": PICTURE, "answer": answer,
         "image_source": f"p{i // 2}", "category": "random"}
        for i, answer in enumerate(["yes", "no"] * 40)
    ])  # fmt: skip
    benchmark, found = load("pope", tmp_path, 80)
    assert rule("Yes, there is.", found[0]).outcome == "correct"
    worth = {q.id: [1.0] for q in found}
    for name in ("0", "1", "2", "3"):  # two missed, two false ones
        worth[name] = [0.0]
    assert results.estimate(benchmark, worth)["score"].value == pytest.approx(38 / 40)


@pytest.mark.parametrize(
    ("response", "text", "by"),
    [
        ("so \\boxed{3} and \\boxed{4}", "4", "box"),
        ("<think>\\boxed{3}</think> The answer is 5.", "5", "phrase"),
        ("Answer: (B)", "(B)", "phrase"),
        ("**Answer:** **C**", "C", "phrase"),
        ("A circle has no corners", "", "none"),
        ("we get\n\n42", "42", "last line"),
        ("therefore\n(C).", "(C)", "last line"),
        ("I think it is A because", "", "none"),
        ("\\boxed{}", "", "none"),
        ("", "", "none"),
        ("\\boxed{{[1, 2]}}", "{[1, 2]}", "box"),
    ],
)
def test_extraction(response: str, text: str, by: str) -> None:
    found = extract(response)
    assert (found.text.strip("()") if text else found.text, found.by) == (text.strip("()"), by)


@pytest.mark.parametrize(
    ("said", "letters"),
    [("B", "B"), ("(b)", ""), ("B.", "B"), ("B: two", "B"), ("option B", "B"), ("two", "B"),
     ("$B$", "B"), ("A circle", ""), ("B, C", "BC"), ("E", ""), ("\\text{B}", "B"), ("2.0", "C"),
     ("A and C", "AC"), ("", "")],
)  # fmt: skip
def test_letters(said: str, letters: str) -> None:
    assert said_letters(said, ["one", "two", "2", "4"]) == letters


def test_lists_yes_no_and_equal_expressions() -> None:
    listed = Question(id="l", text="", kind="list", answer="[1, 2]")
    assert rule("{[1, 2]}", listed).outcome in ("correct", "wrong")  # and no crash
    yes = Question(id="y", text="", kind="yes_no", answer="yes")
    (score,) = score_responses(
        {"y": yes}, [record("y", "<think>There is no dog on the left.</think>Yes, a dog.")]
    )
    assert score.outcome == "correct"
    pairs = [("9√3", r"9\sqrt{3}"), ("CD = AB", "AB=CD"), ("12 cm", "0.12 m"), ("3/4", "0.5"),
             (r"\frac{1}{3}", r"\frac{1}{2}"), ("x=1 or x=-3", "1, -3")]  # fmt: skip
    questions = {str(i): Question(id=str(i), text="", kind="math", answer=g)
                 for i, (_, g) in enumerate(pairs)}  # fmt: skip
    scores = score_responses(
        questions, [record(str(i), f"\\boxed{{{said}}}") for i, (said, _) in enumerate(pairs)]
    )
    outcomes = [score.outcome for score in scores]
    assert outcomes[3:5] == ["wrong", "wrong"]
    assert all(outcome in ("correct", "undecided") for outcome in outcomes[:3] + outcomes[5:])


def record(question: str, response: str, *, sample: int = 0, reason: str = "stop") -> Any:
    return ResponseRecord(
        question=question, sample=sample, seed=1, prompt_sha256="x", order=(), response=response,
        finish_reason=reason, prompt_tokens=1, response_tokens=len(response),
    )  # fmt: skip


def test_a_value_with_another_unit_is_no_option() -> None:
    options = ["5 m", "7 m", "9 cm"]
    assert said_letters("5 m", options) == "A"
    assert said_letters("5", options) == "A"
    assert said_letters("5 cm", options) == ""
    assert said_letters("9 cm", options) == "C"
    assert said_letters("7 m", ["5", "7"]) == "B"


def test_outcomes_of_responses() -> None:
    question = Question(id="q", text="x?", kind="math", answer=r"\frac{1}{2}")
    words = Question(id="w", text="x?", kind="math", answer="30 degrees south")
    judged = Question(id="j", text="x?", kind="judged", answer="a long one")
    scores = score_responses(
        {"q": question, "w": words, "j": judged},
        [record("q", r"\boxed{0.5}"), record("q", r"\boxed{2}"), record("q", "no idea at all"),
         record("q", r"\boxed{0.5}", reason="length"), record("w", r"\boxed{30^\circ S}"),
         record("j", "it is long")],
    )  # fmt: skip
    assert [score.outcome for score in scores] == [
        "correct", "wrong", "no_answer", "truncated", "undecided", "undecided"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (2, {}, r"1 rows in .*; the official files have 2"),
        (1, {"problem": None, "task": "x?"}, r"has no column 'problem'; it has answer, id, task"),
    ],
)
def test_wrong_files_are_one_message(
    tmp_path: Path, rows: int, columns: dict[str, Any], message: str
) -> None:
    row = {"id": 1, "problem": "x?", "answer": "3"} | columns
    row = {key: value for key, value in row.items() if value is not None}
    (tmp_path / "aime24.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(EvaluationError, match=message):
        load_benchmark(adapter("aime24", rows), tmp_path)


def test_other_faults_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no benchmark 'aime26'; shipped are aime24"):
        load_adapter("aime26")
    own = tmp_path / "own.toml"
    own.write_text('name = "own"\nfiles = ["own.jsonl"]\nrows = 0\ncolour = "red"\n')
    with pytest.raises(EvaluationError, match=r"own\.toml: .*colour"):
        load_adapter(str(own))
    own.write_text('name = "own"\nfiles = ["own.jsonl"]\nrows = 0\none_of = ["image"]\n')
    with pytest.raises(EvaluationError, match=r"holds none of own\.jsonl"):
        load_benchmark(load_adapter(str(own)), tmp_path)
    (tmp_path / "own.jsonl").write_text('{"question": "q", "answer": "1", "image": "gone.png"}\n')
    with pytest.raises(EvaluationError, match=r"gone\.png"):
        load_benchmark(load_adapter(str(own)), tmp_path)
    (tmp_path / "own.jsonl").write_text('{"question": "q", "answer": "1"}\n{torn\n')
    with pytest.raises(EvaluationError, match="none of the picture columns image"):
        load_benchmark(load_adapter(str(own)), tmp_path)
    own.write_text('name = "own"\nfiles = ["own.jsonl"]\nrows = 0\n')
    with pytest.raises(EvaluationError, match=r"own\.jsonl:2"):
        load_benchmark(load_adapter(str(own)), tmp_path)
    own.write_text('name = "own"\nfiles = ["own.jsonl"]\nrows = 0\nid = "answer"\n')
    (tmp_path / "own.jsonl").write_text('{"question": "q", "answer": "1"}\n' * 2)
    with pytest.raises(EvaluationError, match="name of another"):
        load_benchmark(load_adapter(str(own)), tmp_path)


def test_records_survive_a_torn_line_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r" / "x.jsonl"
    appender = Appender(path)
    for i in range(3):
        appender.add(record(f"q{i}", "a"))
    appender.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [r.question for r in read_records(path, ResponseRecord)] == ["q0", "q1"]
    again = Appender(path)
    again.add(record("q2", "a"))
    again.close()
    assert path.read_bytes() == whole
    path.write_bytes(whole[:30] + whole[33:])
    with pytest.raises(EvaluationError, match=r"x\.jsonl:1: not a record"):
        read_records(path, ResponseRecord)
    path.write_bytes(whole + whole)
    with pytest.raises(EvaluationError, match="a second record"):
        read_records(path, ResponseRecord)
    write_records(path, [record("q9", "b")])
    assert [r.question for r in read_records(path, ResponseRecord)] == ["q9"]


def test_another_protocol_is_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    check_manifest(path, {"protocol": "a", "model": "m"})
    check_manifest(path, {"protocol": "a", "model": "m"})
    with pytest.raises(EvaluationError, match=r"made with another model \('m', now 'n'\)"):
        check_manifest(path, {"protocol": "a", "model": "n"})
    path.write_text("{")
    with pytest.raises(EvaluationError, match="not JSON"):
        check_manifest(path, {"protocol": "a"})


def test_the_protocol_is_everything_that_a_score_follows_from() -> None:
    adapter_ = load_adapter("aime24")
    base = Protocol().digest(adapter_)
    assert base == Protocol(samples=16).digest(adapter_)  # the adapter's own
    others = [
        Protocol(temperature=0.6), Protocol(samples=4), Protocol(max_tokens=100),
        Protocol(style="official"), Protocol(seed=1),
    ]  # fmt: skip
    assert len({base, *(p.digest(adapter_) for p in others)}) == 6
    assert base != Protocol().digest(msgspec.structs.replace(adapter_, decimals=3))
    question = Question(id="1", text="", kind="math", answer="")
    seeds = {sample_seed(adapter_, question, i, seed=0) for i in range(16)}
    assert len(seeds) == 16


def test_errors_of_a_worked_example() -> None:
    """Four questions in two clusters, by hand: deviations -0.5 0.5 / 0.5 -0.5 sum to 0 each."""
    found = statistics.mean([0.0, 1.0, 1.0, 0.0], ["a", "a", "b", "b"])
    assert (found.value, found.error) == (0.5, 0.0)
    alone = statistics.mean([0.0, 1.0, 1.0, 0.0], [0, 1, 2, 3])
    assert alone.error == pytest.approx(math.sqrt(4 / 3 * 1.0) / 4)
    same = statistics.mean([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"])
    assert same.error == pytest.approx(math.sqrt(2 * 2.0) / 4)
    assert statistics.sampling_error([[1.0, 0.0], [1.0, 1.0]]) == pytest.approx(
        math.sqrt(0.5 / 2) / 2
    )
    assert math.isnan(statistics.sampling_error([[1.0], [0.0]]))
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def coverage(draw: Callable[[np.random.Generator], tuple[statistics.Estimate, float]],
             rounds: int = 400) -> float:  # fmt: skip
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(rounds):
        found, true = draw(rng)
        hits += found.low <= true <= found.high
    return hits / rounds


@pytest.mark.parametrize(("questions", "samples"), [(30, 1), (30, 16), (300, 1), (300, 4)])
def test_intervals_over_questions_cover_what_they_say(questions: int, samples: int) -> None:
    def draw(rng: np.random.Generator) -> tuple[statistics.Estimate, float]:
        chances = rng.beta(0.6, 0.4, questions)  # difficulty spread as Beta with a + b = 1
        values = rng.binomial(samples, chances) / samples
        return statistics.mean(values.tolist(), list(range(questions))), 0.6

    assert 0.92 <= coverage(draw) <= 0.98


def test_clustered_and_paired_intervals_cover_what_they_say() -> None:
    def clustered(rng: np.random.Generator) -> tuple[statistics.Estimate, float]:
        chances = np.repeat(rng.beta(0.5, 0.5, 60), 5)
        values = rng.binomial(1, chances).astype(float)
        return statistics.mean(values.tolist(), np.repeat(range(60), 5).tolist()), 0.5

    assert 0.92 <= coverage(clustered) <= 0.98

    def naive(rng: np.random.Generator) -> tuple[statistics.Estimate, float]:
        chances = np.repeat(rng.beta(0.5, 0.5, 60), 5)
        values = rng.binomial(1, chances).astype(float)
        return statistics.mean(values.tolist(), list(range(300))), 0.5

    assert coverage(naive) < 0.9  # what clustering is for

    def paired(rng: np.random.Generator) -> tuple[statistics.Estimate, float]:
        first = rng.beta(0.5, 0.5, 200)
        second = np.clip(first + 0.1 * rng.standard_normal(200), 0, 1)
        a, b = rng.binomial(4, first) / 4, rng.binomial(4, second) / 4
        found = statistics.paired(a.tolist(), b.tolist(), list(range(200)))
        return statistics.Estimate(found.value, found.error, found.low, found.high, 200), 0.0

    assert 0.92 <= coverage(paired) <= 0.98


def test_the_bootstrap_of_a_worst_case_covers_what_it_says(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    chances = np.random.default_rng(1).beta(6, 1, 100_000)
    true = float((chances**5).mean())

    def draw(rng: np.random.Generator) -> tuple[statistics.Estimate, float]:
        worst = rng.binomial(1, rng.beta(6, 1, 150)[:, None], (150, 5)).prod(1).astype(float)
        return statistics.bootstrap(lambda d: float(worst[d].mean()), 150), true

    assert 0.92 <= coverage(draw) <= 0.98


def test_contamination_finds_planted_duplicates_and_no_near_misses(tmp_path: Path) -> None:
    long = "In a right triangle the two legs have lengths three and four what is the hypotenuse"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name, array in (("a", noise), ("b", noise.swapaxes(0, 1))):
        Image.fromarray(np.ascontiguousarray(array)).save(tmp_path / f"{name}.png")
    Image.open(tmp_path / "a.png").save(tmp_path / "same.bmp")  # other bytes, the same pixels
    Image.open(tmp_path / "a.png").resize((32, 32)).save(tmp_path / "small.png")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [
        {"prompt": long, "answer": "5"},
        {"prompt": "What is shown?", "answer": "5", "images": ["a.png"]},
    ]))  # fmt: skip
    training = contamination.read_training([str(tmp_path / "train.jsonl")])
    own = tmp_path / "own.toml"
    own.write_text('name = "own"\nfiles = ["own.jsonl"]\nrows = 0\nid = "id"\n'
                   'pictures = ["image"]\n')  # fmt: skip
    rows = [
        ("text", long.upper() + "?", None), ("other", long.replace("triangle", "angle"), None),
        ("pixels", "Quite another question", "same.bmp"), ("near", "Another", "small.png"),
        ("short", "What is shown?", "b.png"), ("both", "What is shown?", "a.png"),
    ]  # fmt: skip
    (tmp_path / "own.jsonl").write_text("".join(
        json.dumps({"id": name, "question": text, "image": image, "answer": "1"}) + "\n"
        for name, text, image in rows
    ))  # fmt: skip
    questions = load_benchmark(load_adapter(str(own)), tmp_path).questions
    found = {each.question: each for each in contamination.find(list(questions), training)}
    assert {name for name, each in found.items() if each.seen} == {"text", "pixels", "both"}
    assert found["near"].picture == "near"
    assert "short" not in found


def folder_of(tmp_path: Path, name: str, outcomes: list[str], *, protocol: str = "p",
              judge: str | None = None) -> Path:  # fmt: skip
    folder = tmp_path / name
    check_manifest(folder / "responses/aime24.json",
                   {"protocol": protocol, "limit": 0, "files": {},
                    "adapter": msgspec.to_builtins(load_adapter("aime24"))})  # fmt: skip
    write_whole(folder / "scores/aime24.json", json.dumps({"judge": judge}).encode())
    write_records(folder / "scores/aime24.jsonl", [
        ScoreRecord(question=str(i), sample=0, outcome=outcome, extracted="", extracted_by="box",
                    rule="number")
        for i, outcome in enumerate(outcomes)
    ])  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('{"final_answer": "\\\\frac{1}{2}", "correct": true}', True),
        ('{"final_answer": "\\sqrt{3}", "correct": false}', False),  # backslash not doubled
        ('I think {x} is fine: ```json\n{"correct": true}\n```', True),
        ("it is correct", None), ('{"correct": "yes"}', None), ("", None),
        ('{"extract_answer": "Not Applicable", "score": 1}', 1.0),  # CharXiv's rubric
        ('{"extract_answer": "$\\alpha$", "score": 0}', 0.0), ('{"score": "0.4"}', 0.4),
        ('{"score": 4}', None), ('{"score": null}', None), ('{"score": "high"}', None),
    ],
)  # fmt: skip
def test_what_a_judge_says(answer: str, verdict: float | None) -> None:
    assert parse(answer) == verdict


def test_compare_is_paired_and_refuses_other_protocols(tmp_path: Path, capsys) -> None:
    first = folder_of(tmp_path, "a", ["correct"] * 10 + ["wrong"] * 20)
    second = folder_of(tmp_path, "b", ["correct"] * 18 + ["wrong"] * 12)
    evaluate.compare(evaluate.parser().parse_args(["compare", str(first), str(second)]))
    line = capsys.readouterr().out.splitlines()[-1]
    assert "| aime24 | 33.3 | 60.0 | +26.7 |" in line
    assert "| 8 · 0 |" in line
    assert "0.008" in line  # McNemar's exact test: 2 / 2^8
    other = folder_of(tmp_path, "c", ["correct"] * 30, protocol="q")
    judged = folder_of(tmp_path, "d", ["correct"] * 30, judge="j")
    with pytest.raises(EvaluationError, match="scored with another judge"):
        evaluate.compare(evaluate.parser().parse_args(["compare", str(first), str(judged)]))
    with pytest.raises(EvaluationError, match="another protocol"):
        evaluate.compare(evaluate.parser().parse_args(["compare", str(first), str(other)]))


def test_a_benchmark_that_needs_a_judge_is_refused_between_steps(tmp_path: Path) -> None:
    benchmarks.write(tmp_path, count=10, seed=3)
    path = tmp_path / "toy_choice.toml"
    path.write_text(path.read_text().replace('kind = "choice"', 'kind = "graded"'))
    config = load_config(ROOT / "configs" / "tiny.toml", [
        f'evaluation.benchmarks=["{path}"]', f'evaluation.benchmark_data="{tmp_path}"',
    ])  # fmt: skip
    chat = ChatTemplate(BASE_MODEL, image_token_id=read_shape(BASE_MODEL).image_token_id)
    with pytest.raises(EvaluationError, match="toy_choice is graded by a judge"):
        read_benchmarks(config, RunData.of(config, chat, lambda work: work()))


def test_benchmarks_between_steps(tmp_path: Path) -> None:
    """Read, checked and asked as a run does; scored by the same rules."""
    benchmarks.write(tmp_path, count=10, seed=3)
    named = [str(tmp_path / f"{name}.toml") for name in ("toy_mathvision", "toy_choice")]
    config = load_config(ROOT / "configs" / "tiny.toml", [
        f"evaluation.benchmarks={json.dumps(named)}", f'evaluation.benchmark_data="{tmp_path}"',
        "evaluation.benchmark_questions=4",
    ])  # fmt: skip
    chat = ChatTemplate(BASE_MODEL, image_token_id=read_shape(BASE_MODEL).image_token_id)
    data = RunData.of(config, chat, lambda work: work())
    asked = read_benchmarks(config, data)
    assert list(asked) == ["toy_mathvision", "toy_choice"]
    assert data.image_limits.count == 1
    (tmp_path / "text.jsonl").write_text('{"prompt": "Say 1.", "answer": "1"}\n')
    text = (DataSource(path=str(tmp_path / "text.jsonl")),)
    alone = replace(
        config, rl=replace(config.rl, sources=text), evaluation=replace(config.evaluation,
        sources=()), run=replace(config.run, root=str(tmp_path), stages=("rl",)),
    )  # fmt: skip
    assert serve.options_of(alone, on_gpu=False).images == data.image_limits, "on another node too"
    seen: list[tuple[str, ...]] = []

    class Fleet:
        """Answers every second question right."""

        def generate(self, prompts: tuple[Prompt, ...], **options: Any) -> list[Response]:
            seen.append(tuple(prompt.id for prompt in prompts))
            return [
                Response(
                    prompt_index=i, sample_index=0, prompt_tokens=np.zeros(5, dtype=np.int64),
                    response_tokens=np.zeros(7, dtype=np.int64),
                    rollout_logprobs=np.zeros(7, dtype=np.float32),
                    text=f"\\boxed{{{prompt.answer if i % 2 else 'nothing'}}}",
                    finish_reason="stop", versions=(VersionSpan(0, 0),),
                )
                for i, prompt in enumerate(prompts)
            ]  # fmt: skip

        def sleep(self) -> None:
            pass

    held_out = HeldOut(
        {}, fleet=Fleet(), verifier=Verifier(config.reward), mesh=OneRank(),
        max_tokens=9, every=0, benchmarks=asked,
    )  # type: ignore[arg-type]  # fmt: skip
    metrics = held_out.measure()
    assert [len(ids) for ids in seen] == [4, 4]
    assert metrics["eval/toy_mathvision/accuracy"] == 0.5
    assert metrics["eval/toy_choice/accuracy"] == 0.5
    assert metrics["eval/toy_choice/undecided"] == 0.5
    assert metrics["eval/toy_mathvision/length_tokens"] == 7.0
    for key in metrics:
        meaning_of(key)
    with pytest.raises(EvaluationError, match=r"over rl\.max_prompt_tokens=1; raise it"):
        read_benchmarks(load_config(ROOT / "configs" / "tiny.toml", [
            f"evaluation.benchmarks={json.dumps(named)}", "rl.max_prompt_tokens=1",
            f'evaluation.benchmark_data="{tmp_path}"',
        ]), data)  # fmt: skip
    with pytest.raises(ConfigError, match="needs evaluation.benchmark_data"):
        load_config(ROOT / "configs" / "tiny.toml", ['evaluation.benchmarks=["aime24"]'])
