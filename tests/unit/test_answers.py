"""Answers: out of a response, what is the same, and what a data set's column holds."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answer_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr_fast.grading.boxes import last_boxed
from ovr_fast.grading.exact import form, is_same
from ovr_fast.grading.gold import AnswerError, clean_gold, text_of
from ovr_fast.grading.verdict import math_verify


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{3}", "3"),
        (r"first \boxed{1}, no, \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\fbox{3}", "3"),
        (r"\\boxed{3}", "3"),
        (r"\boxed 5", "5"),
        (r"so $\boxed 42$.", "42"),
        (r"\boxed A.", "A"),
        (r"it goes into a \boxed command: \boxed{7}", "7"),
        (r"\boxed{7} is what I put into the \boxed command", "7"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{a \boxed{b} c}", "a b c"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"a stray } then \boxed{1}", "1"),
        (r"a stray { then \boxed{1}", "1"),
        (r"\boxed{a} then \boxed{unfinished", "a"),
        (r"\boxed{outer \boxed{in} is open", "in"),
        (r"\boxed{unfinished", None),
        (r"\boxed", None),
        ("no box", None),
        ("", None),
        (r"\boxed{}", ""),
        (r"\boxed{ . }", ""),
        (r"\boxed{$$}", ""),
        (r"\boxed{1} and later \boxed{}", ""),
    ],
)
def test_the_last_complete_box_counts(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 8200,  # 57 kB
        r"\boxed{x" * 7000 + "}" * 3000,
        "{" * 57_000,
        r"\boxed{" + "{" * 57_000,
        r"\boxed 1" * 7000,
        "\\" * 57_000 + "boxed{1}",
    ],
)
def test_extraction_takes_time_in_proportion_to_the_text(text: str) -> None:
    """The limit is for 57 kB of unclosed boxes: they take 4 ms of a processor, whatever the machine
    does beside."""
    last_boxed(text[:1000])
    times = []
    for _ in range(5):
        began = time.thread_time()
        last_boxed(text)
        times.append(time.thread_time() - began)
    assert min(times) < 0.040


@pytest.mark.parametrize(("gold", "said", "exact", "equivalent", "why"), CASES)
def test_the_table_of_answers(
    gold: str, said: str, exact: bool, equivalent: bool, why: str
) -> None:
    assert is_same(said, gold) is exact, why
    assert is_same(gold, said) is exact, f"{why}, turned round"
    assert math_verify(said, gold, "") is equivalent, why


def test_the_table_has_as_many_rows_as_it_should() -> None:
    assert len({case[:2] for case in CASES}) == len(CASES) >= 200
    assert all(equivalent >= exact for _, _, exact, equivalent, _ in CASES)


@settings(max_examples=1000, deadline=None)
@given(st.text(alphabet=r"\{}[]()$^_ 0123456789.,;:=+-/*%°½²abxAB" "\n\x00−\ud7ff", max_size=60))
def test_any_text_has_a_form_and_equals_itself_or_is_empty(text: str) -> None:
    assert is_same(text, text) is bool(form(text).value)
    last_boxed(rf"\boxed{{{text}}}")


COMMANDS = st.sampled_from(
    [r"\frac", r"\boxed", r"\text{", r"\left", r"\right", r"\sqrt", "^", "{", "}", "1", "x", " "]
)


@settings(max_examples=1000, deadline=None)
@given(st.lists(COMMANDS, max_size=40).map("".join))
def test_broken_latex_is_no_error(text: str) -> None:
    is_same(text, "1")
    last_boxed(text)


@pytest.mark.parametrize(
    ("question", "said", "gold", "right"),
    [
        ("What is 2+3?", "2+3", "5", False),
        (r"Simplify $\frac{x^2-1}{x-1}$.", r"\dfrac{x^2-1}{x-1}", "x+1", False),
        ("What is 2+3?", "5", "5", True),
        ("What is 2+3?", "10/2", "5", True),
        ("Write x+1 in another order.", "x+1", "x+1", True),  # the very answer
        ("", "2+3", "5", True),
        ("What is 2+3?", "2+3.", "5", False),
        ("What is 2+3?", "(2+3)", "5", False),
        ("What is 2+3?", r"\text{2+3}", "5", False),
        ("What is 2+3?", "x=2+3", "5", False),
        ("What is 2+3?", "2+3 cm", "5", False),
        ("What is 2+3?", "3+2", "5", False),
        (r"Compute $17 \times 23$.", r"17\cdot23", "391", False),
        (r"What is $\frac{1}{2}+\frac{1}{3}$?", r"\frac12+\frac13", r"\frac56", False),
        (r"What is $\log_2 8$?", r"\log_2 8", "3", False),
        (r"What is $\binom{10}{3}$?", r"\binom{10}{3}", "120", False),
        (r"What is $10!$?", "10!", "3628800", False),
        ("What is 6/3?", "6/3", "2", False),
        ("What are 2+3 and 4+5?", "2+3, 4+5", "5, 9", False),
        ("What is half of 3?", r"\frac{3}{2}", "1.5", True),
        ("Twice 512 is?", "1024", "2^{10}", True),
        ("How long is the diagonal of a unit square?", r"\frac{2}{\sqrt2}", r"\sqrt2", True),
    ],
)
def test_an_expression_copied_from_the_question_is_no_answer(
    question: str, said: str, gold: str, right: bool
) -> None:
    assert math_verify(said, gold, question) is right


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        ("5", "5"),
        (5, "5"),
        (np.int64(5), "5"),
        (0.1, "0.1"),
        (1e16, "10000000000000000"),
        (np.float64(0.1), "0.1"),
        (np.bool_(True), "True"),
        (np.array(["A"]), "A"),
        ("\\begin{pmatrix}\n1 \\\\\n2\\end{pmatrix}", "\\begin{pmatrix}\n1 \\\\\n2\\end{pmatrix}"),
        (5.0, "5.0"),
        (True, "True"),
        (Decimal("5.50"), "5.5"),
        (Decimal("1E+3"), "1000"),
        (["A"], "A"),
        ([["A"]], "A"),
        (" 5 ", "5"),
        (r"\boxed{5}", "5"),
        (r"so it is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("<answer> 5 </answer>", "5"),
        (r"<think>...</think><answer>\boxed{5}</answer>", "5"),
        ("#### 42", "42"),
        ("So 2+3 = <<2+3=5>>5\n#### 5", "5"),
        ("$5$", "$5$"),
    ],
)
def test_golds_are_cleaned(cell: Any, answer: str) -> None:
    text = text_of(cell, "answer")
    assert text is not None
    assert clean_gold(text) == answer


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (["A", "B"], "a list of 2"),
        ({"ground_truth": "3", "style": "rule"}, "answer.ground_truth, answer.style"),
        (float("nan"), "holds nan"),
        (float("inf"), "holds inf"),
        (Decimal("NaN"), "holds NaN"),
        (b"5", "holds a bytes"),
        (object(), "neither text nor number"),
        ("", "it is empty"),
        ("  ", "it is empty"),
        (".", "nothing is left"),
        (r"\boxed{}", "it is empty"),
        ("first\nthen", "several lines"),
        ("x" * 201, "201 characters"),
        (r"\frac{1}{2", "braces do not close"),
        ("}{", "braces do not close"),
    ],
)
def test_answers_that_nobody_could_give_are_named(cell: Any, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        clean_gold(text_of(cell, "answer") or "")


@pytest.mark.parametrize(
    "text", ["<answer>" * 12_500, "####" + " " * 50_000 + "a\nb", "#" * 90_000]
)
def test_cleaning_takes_time_in_proportion_to_the_text(text: str) -> None:
    began = time.thread_time()
    with pytest.raises(AnswerError):
        clean_gold(text)
    assert time.thread_time() - began < 0.5


def test_no_answer_is_none() -> None:
    assert text_of(None, "answer") is None
    assert text_of([], "answer") is None


SHARED = Path(__file__).with_name("public_answers.jsonl")


def test_public_triples() -> None:
    """Facts from public graders' tests: what a careful person would say."""
    for line in SHARED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        try:
            gold = clean_gold(text_of(row["gold"], "answer") or "")
        except AnswerError:
            assert not row["right"], row
            continue
        said = last_boxed(row["response"]) or ""
        assert is_same(said, gold) is row["right"], row
        assert math_verify(said, gold, "") is row["right"], row
