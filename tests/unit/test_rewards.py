"""Answers: extraction, normalisation, and worker processes that hang or crash."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import pytest

from ovr_fast.config import RewardConfig
from ovr_fast.records import Response
from ovr_fast.rl.rewards import Verifier, is_correct, last_boxed, normalize


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{3}", "3"),
        (r"first \boxed{1}, no, \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a} then \boxed{unfinished", "a"),
        ("no box", None),
        (r"\boxed{}", ""),
    ],
)
def test_last_complete_box(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1,234", "1234", True),
        (" Red ", "red", True),
        ("$5$", "5", True),
        ("7.0", "7", True),
        (r"\text{top}", "top", True),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        ("12", "1 2", True),
        ("1,2", "12", False),
        ("3", "-3", False),
        ("0.5", "5", False),
    ],
)
def test_normalisation_keeps_what_matters(a: str, b: str, same: bool) -> None:
    assert (normalize(a) == normalize(b)) is same


def test_math_verify_sees_equivalence_that_exact_does_not() -> None:
    assert not is_correct("1/2", "0.5", "exact")
    assert is_correct("1/2", "0.5", "math_verify")
    assert not is_correct("1/3", "0.5", "math_verify")


def response(text: str, finish: str = "stop") -> Response:
    return Response(
        prompt_index=0,
        sample_index=0,
        prompt_tokens=np.zeros(1, dtype=np.int64),
        response_tokens=np.zeros(1, dtype=np.int64),
        rollout_logprobs=np.zeros(1, dtype=np.float32),
        text=text,
        finish_reason=finish,
        first_policy_version=0,
        last_policy_version=0,
    )


def hang_or_crash(pipe, method) -> None:
    """A worker that sleeps on "hang", dies on "crash", and is honest otherwise."""
    while True:
        try:
            said, answer = pipe.recv()
        except EOFError:
            return
        if said == "hang":
            time.sleep(600)
        if said == "crash":
            os._exit(3)
        pipe.send(is_correct(said, answer, method))


def test_a_hanging_and_a_crashing_check_are_killed_counted_and_harm_no_other() -> None:
    config = RewardConfig(method="math_verify", timeout_s=1.0, workers=2, max_failure_share=1.0)
    verifier = Verifier(config, serve=hang_or_crash)
    try:
        verifier.check([("1/4", "0.25")] * 2)  # both workers have imported what they need
        began = time.monotonic()
        outcomes = verifier.check(
            [("hang", "1"), ("crash", "1"), ("1/2", "0.5"), ("1/3", "0.5"), ("2", "2")]
        )
    finally:
        verifier.close()
    assert outcomes == ["timeout", "crash", "correct", "wrong", "correct"]
    assert time.monotonic() - began < 90


def test_truncated_and_boxless_responses_earn_nothing() -> None:
    verifier = Verifier(RewardConfig())
    rollouts = verifier.reward(
        [
            response(r"\boxed{1}"),
            response(r"\boxed{1}", "length"),
            response("1"),
            response(r"\boxed{2}"),
        ],
        ["1"] * 4,
    )
    assert [r.outcome for r in rollouts] == ["correct", "truncated", "no_answer", "wrong"]
    assert [r.reward for r in rollouts] == [1.0, 0.0, 0.0, 0.0]


def test_too_many_failed_checks_stop_the_run() -> None:
    config = RewardConfig(method="math_verify", timeout_s=1.0, workers=1, max_failure_share=0.1)
    verifier = Verifier(replace(config), serve=hang_or_crash)
    try:
        with pytest.raises(RuntimeError, match="reward.max_failure_share"):
            verifier.reward([response(r"\boxed{crash}")], ["1"])
    finally:
        verifier.close()
