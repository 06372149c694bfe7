"""Rewards, and checkers that hang, crash, eat memory or cannot start."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from ovr_fast.config import RewardConfig
from ovr_fast.records import Response, VersionSpan
from ovr_fast.rl.rewards import Verifier

PLANTED = f"{Path(__file__).with_name('planted_check.py')}:check"


def response(text: str, finish: str = "stop") -> Response:
    return Response(
        prompt_index=0,
        sample_index=0,
        prompt_tokens=np.zeros(1, dtype=np.int64),
        response_tokens=np.zeros(1, dtype=np.int64),
        rollout_logprobs=np.zeros(1, dtype=np.float32),
        text=text,
        finish_reason=finish,
        versions=(VersionSpan(0, 0),),
    )


def test_a_hanging_and_a_crashing_check_are_killed_counted_and_harm_no_other() -> None:
    config = RewardConfig(method="math_verify", timeout_s=1.0, workers=2, max_failure_share=1.0)
    verifier = Verifier(config, check=PLANTED)
    try:
        verifier.check([("warm", "1")] * 4)  # the imports are over
        began = time.monotonic()
        outcomes = verifier.check(
            [("hang", "1"), ("crash", "1"), ("raise", "1"), ("right", "1"), ("2", "2"), ("3", "1")]
        )
    finally:
        verifier.close()
    assert outcomes == ["timeout", "crash", "crash", "correct", "correct", "wrong"]
    assert time.monotonic() - began < 5


def test_answers_that_hang_cost_their_deadline_over_the_workers() -> None:
    """Six answers, a second each, two workers: three seconds, not the imports of six checkers."""
    config = RewardConfig(method="math_verify", timeout_s=1.0, workers=2, max_failure_share=1.0)
    verifier = Verifier(config, check=PLANTED)
    try:
        verifier.check([("warm", "1")] * 4)
        began = time.monotonic()
        assert verifier.check([("hang", "1")] * 6) == ["timeout"] * 6
        took = time.monotonic() - began
    finally:
        verifier.close()
    assert 3.0 <= took < 4.5


def test_a_check_that_eats_memory_is_a_crash_and_harms_no_other() -> None:
    config = RewardConfig(method="math_verify", workers=1, memory_gib=0.5, max_failure_share=1.0)
    verifier = Verifier(config, check=PLANTED)
    try:
        assert verifier.check([("eat", "1"), ("right", "1")]) == ["crash", "correct"]
    finally:
        verifier.close()


def test_an_interrupted_call_leaves_nothing_to_the_next() -> None:
    config = RewardConfig(method="math_verify", timeout_s=2.0, workers=2, max_failure_share=1.0)
    verifier = Verifier(config, check=PLANTED)
    try:
        verifier.check([("warm", "1")] * 2)

        def interrupt(*arguments: object) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            verifier.check([("hang", "1")] * 4)
        assert verifier.check([("right", "1"), ("3", "1")]) == ["correct", "wrong"]
    finally:
        verifier.close()
    with pytest.raises(RuntimeError, match="closed"):
        verifier.check([("1", "2")])


def test_what_a_check_starts_ends_with_it() -> None:
    config = RewardConfig(method="math_verify", timeout_s=1.0, workers=1, max_failure_share=1.0)
    verifier = Verifier(config, check=PLANTED)
    try:
        assert verifier.check([("spawn", "1")]) == ["timeout"]
        time.sleep(0.2)
        names = [" ".join(process.info["cmdline"] or []) for process in
                 psutil.process_iter(["cmdline"])]  # fmt: skip
        assert "sleep 4242" not in names
    finally:
        verifier.close()


def test_a_checker_that_cannot_start_stops_the_run() -> None:
    verifier = Verifier(RewardConfig(method="math_verify", workers=1), check="nowhere:check")
    try:
        with pytest.raises(RuntimeError, match="end as soon as they start"):
            verifier.check([("1", "2")])
    finally:
        verifier.close()


def test_the_methods_differ_as_they_say() -> None:
    for method, outcome in (("exact", "wrong"), ("math_verify", "correct")):
        verifier = Verifier(RewardConfig(method=method, workers=1))
        try:
            assert verifier.check([("1/2", "0.5"), ("1/3", "0.5")]) == [outcome, "wrong"]
            copied = verifier.check([("2+3", "5")], ["What is 2+3?"])
            assert copied == ["wrong"]
        finally:
            verifier.close()


def test_truncated_and_boxless_responses_earn_nothing() -> None:
    verifier = Verifier(RewardConfig())
    rollouts = verifier.reward(
        [
            response(r"\boxed{1}"),
            response(r"\boxed{1}", "length"),
            response("1"),
            response(r"\boxed{2}"),
            response(r"\boxed{}"),
        ],
        ["1"] * 5,
    )
    assert [r.outcome for r in rollouts] == [
        "correct", "truncated", "no_answer", "wrong", "no_answer",
    ]  # fmt: skip
    assert [r.reward for r in rollouts] == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_too_many_failed_checks_stop_the_run() -> None:
    config = RewardConfig(method="math_verify", timeout_s=1.0, workers=1, max_failure_share=0.1)
    verifier = Verifier(config, check=PLANTED)
    try:
        with pytest.raises(RuntimeError, match="reward.max_failure_share"):
            verifier.reward([response(r"\boxed{crash}")], ["1"])
    finally:
        verifier.close()
