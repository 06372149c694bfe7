"""Rewards, and checkers that hang, crash, eat memory or cannot start."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from ovr_fast.config import DataSource, RewardConfig, RewardPart, load_config
from ovr_fast.data.check_reward import check_reward
from ovr_fast.data.errors import DataError
from ovr_fast.data.prompts import read_source
from ovr_fast.data.rollouts import read_rollouts, write_rollouts
from ovr_fast.recipe.metrics import repeated, rollout_metrics
from ovr_fast.records import Response, Rollout, RolloutBatch, VersionSpan
from ovr_fast.rl.rewards import RewardFunctionError, TooManyFailures, Verifier
from ovr_fast.settings import ConfigError
from support.toy_run import ROOT

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
        with pytest.raises(RewardFunctionError, match=r"nowhere:check: ModuleNotFoundError"):
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


def own(tmp_path: Path, text: str, **settings) -> Verifier:
    """A verifier with a reward function of one's own."""
    path = tmp_path / "mine.py"
    path.write_text(text)
    config = RewardConfig(function=f"{path}:score", workers=2, timeout_s=1.0, **settings)
    return Verifier(config)


def test_a_reward_of_three_lines_changes_the_metrics(tmp_path: Path) -> None:
    verifier = own(
        tmp_path,
        """
def score(response, answer, **row):
    near = 1.0 - abs(float(response) - float(answer)) / 10
    return {"reward": near - 0.5 * (row["finish_reason"] == "length"), "near": near}
""",
    )
    try:
        rollouts = verifier.reward(
            [response("3"), response("5"), response("-20", "length")], ["3"] * 3,
            ["1 + 2"] * 3, [("p", "s")] * 3,
        )  # fmt: skip
    finally:
        verifier.close()
    assert [round(r.reward, 6) for r in rollouts] == [1.0, 0.8, -1.8]
    assert [r.outcome for r in rollouts] == ["scored", "scored", "truncated"]
    metrics = rollout_metrics(RolloutBatch(step=1, rollouts=tuple(rollouts)), image_token_id=9)
    assert metrics["reward/near"] == pytest.approx((1.0 + 0.8 - 1.3) / 3)
    assert metrics["rollout/reward"] == pytest.approx(0.0)
    assert metrics["rollout/mixed_prompts"] == 1.0
    assert metrics["reward/scored"] == pytest.approx(2 / 3)


def test_a_function_gets_the_columns_that_it_names(tmp_path: Path) -> None:
    verifier = own(
        tmp_path,
        """
def score(response, answer, question, id):
    return response == f"{question}/{answer}/{id}"
""",
    )
    try:
        rollouts = verifier.reward([response("q/a/p")], ["a"], ["q"], [("p", "s")])
    finally:
        verifier.close()
    assert rollouts[0].reward == 1.0


FAULTY = """
import time
def score(response, answer):
    if response == "raise":
        return {}["gone"]
    if response == "hang":
        time.sleep(60)
    if response == "eat":
        return len(bytearray(8 << 30))
    return {"nan": float("nan"), "text": "good", "none": None, "list": [1], "key": {"other": 1.0},
            "taken": {"reward": 1.0, "correct": 1.0}}.get(response, 0.25)
"""


def test_a_function_that_fails_is_one_message_a_kind_with_its_row(tmp_path: Path, capsys) -> None:
    verifier = own(tmp_path, FAULTY, max_failure_share=1.0, memory_gib=4.0)
    texts = ["fine", "raise", "raise", "hang", "eat", "nan", "text", "none", "list", "key",
             "taken", "fine"]  # fmt: skip
    try:
        rollouts = verifier.reward([response(text) for text in texts], ["1"] * len(texts))
    finally:
        verifier.close()
    assert [r.reward for r in rollouts] == [0.25] + [0.0] * 10 + [0.25]
    assert [r.outcome for r in rollouts] == [
        "scored", "crash", "crash", "timeout", *["crash"] * 7, "scored"
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("KeyError: 'gone' (mine.py:5); prompt 1") == 1
    for text in (
        "MemoryError",
        "reward is nan, not finite",
        "'good', not a number",
        "None, not a number",
        "a dict of other, without reward",
        "names correct, which is an outcome",
    ):
        assert text in said, (text, said)


def test_too_many_failures_of_a_function_end_the_run(tmp_path: Path) -> None:
    verifier = own(tmp_path, FAULTY)
    try:
        with pytest.raises(
            TooManyFailures, match=r"1 of 2 answer checks failed .* mend .*mine\.py"
        ):
            verifier.reward([response("raise"), response("fine")], ["1"] * 2)
    finally:
        verifier.close()


PARTS = """
import asyncio

def short(response, answer, response_tokens):
    return -float(response_tokens)

async def judged(response, answer, level):
    await asyncio.sleep(0.3 if response != "late" else 60)
    if response == "bad":
        raise KeyError("no verdict")
    return {"reward": float(level), "sure": 0.5}

def all_at_once(responses, answers, id):
    assert len(responses) == len(answers) == len(id)
    return [r == a for r, a in zip(responses, answers)]
"""


def with_parts(tmp_path: Path, *parts: RewardPart, **settings) -> Verifier:
    path = tmp_path / "mine.py"
    path.write_text(PARTS)
    own = tuple(replace(part, function=f"{path}:{part.function}") for part in parts)
    return Verifier(RewardConfig(parts=own, workers=2, timeout_s=2.0, **settings))


def test_parts_are_weighed_and_async_ones_wait_together(tmp_path: Path) -> None:
    verifier = with_parts(
        tmp_path, RewardPart(name="length", function="short", weight=0.1),
        RewardPart(name="judge", function="judged", weight=2.0),
        RewardPart(name="exact", function="all_at_once", sources=("maths",)),
        batch=20,
    )  # fmt: skip
    texts = ["7"] * 30 + ["8"] * 10
    names = [(f"p{n}", "maths" if n % 2 else "words") for n in range(40)]
    try:
        began = time.monotonic()
        rollouts = verifier.reward(
            [response(text) for text in texts], ["7"] * 40, ["q"] * 40, names,
            [{"level": n % 3} for n in range(40)],
        )  # fmt: skip
        assert time.monotonic() - began < 5.0  # 40 waits of 0.3 s
    finally:
        verifier.close()
    for n, rollout in enumerate(rollouts):
        exact = float(n < 30) if n % 2 else 0.0
        tokens = len(rollout.response_tokens)
        assert rollout.reward == pytest.approx(-0.1 * tokens + 2.0 * (n % 3) + exact)
        scores = dict(rollout.scores)
        assert scores["judge"] == n % 3
        assert scores["judge/sure"] == 0.5
        assert ("exact" in scores) == (n % 2 == 1)
        assert rollout.outcome == "scored"
    metrics = rollout_metrics(RolloutBatch(step=1, rollouts=tuple(rollouts)), image_token_id=9)
    assert metrics["reward/judge"] == pytest.approx(sum(n % 3 for n in range(40)) / 40)
    assert metrics["reward/exact"] == pytest.approx(0.75)  # of the rollouts that have it


def test_a_part_that_fails_fails_its_response_alone(tmp_path: Path, capsys) -> None:
    verifier = with_parts(
        tmp_path, RewardPart(name="judge", function="judged"),
        RewardPart(name="exact", function="all_at_once"), max_failure_share=1.0,
    )  # fmt: skip
    texts = ["7", "late", "bad", "7"]
    try:
        rollouts = verifier.reward(
            [response(text) for text in texts], ["7"] * 4, None, None, [{"level": 1}] * 4
        )
    finally:
        verifier.close()
    assert [r.outcome for r in rollouts] == ["scored", "timeout", "crash", "scored"]
    assert [r.reward for r in rollouts] == [2.0, 0.0, 0.0, 2.0]
    said = capsys.readouterr().out
    assert "reward.parts judge: timeout; prompt 1" in said
    assert "reward.parts judge: KeyError: 'no verdict' (mine.py:" in said


def test_lists_of_another_length_are_a_failure_with_its_reason(tmp_path: Path, capsys) -> None:
    verifier = own(tmp_path, "def score(responses, answers): return [1.0]", max_failure_share=1.0)
    try:
        rollouts = verifier.reward([response("a"), response("b")], ["1"] * 2)
    finally:
        verifier.close()
    assert [r.outcome for r in rollouts] == ["crash", "crash"]
    assert "it returned 1 rewards for 2 responses" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward.function=a.py:f", 'reward.parts=[{name="x", function="a.py:f"}]'], "two ways"),
        (['reward.parts=[{name="x", function="a.py:f"}, {name="x", function="b.py:f"}]'],
         "have one name"),
        (['reward.parts=[{name="x"}]'], "names no function"),
        (['reward.parts=[{name="x", function="a.py:f", sources=["gone"]}]'],
         "the source 'gone'; there are images, rl_images, rl_text, text_twins"),
        (['reward.parts=[{name="x", function="a.py:f", sources=["rl_text"]}]'],
         "no part of reward.parts is for the source 'images'"),
    ],
    ids=["both", "twice", "nothing", "no source", "bare source"],
)  # fmt: skip
def test_parts_that_contradict_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs" / "tiny.toml", words)


def test_further_columns_reach_the_function_from_the_file_and_from_a_recording(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1), "meta": {"level": i}} for i in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(path), columns=("meta.level", "meta"))
    prompts = read_source(source, need="answer")
    assert [p.columns for p in prompts] == [
        {"meta.level": i, "meta": {"level": i}} for i in range(4)
    ]
    rollout = replace(
        Rollout.of(response("1"), reward=0.5, outcome="scored", scores=(("near", 0.25),)),
        prompt_tokens=np.array([1]), response_tokens=np.array([1]),
        rollout_logprobs=np.zeros(1, np.float32),
    )  # fmt: skip
    write_rollouts(
        tmp_path / "1.parquet",
        RolloutBatch(step=1, prompts=(prompts[2],), rollouts=(rollout,)),
    )
    again = read_rollouts(tmp_path / "1.parquet")
    assert again.rollouts[0].scores == (("near", 0.25),)
    assert again.prompts[0].columns == prompts[2].columns
    with pytest.raises(DataError, match="no row has the column 'gone'"):
        read_source(replace(source, columns=("gone",)), need="answer")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.py:score", "async def score(responses, answers): return []", "take response and"),
        ("mine.py:score", "def other(response, answer): return 1", "has no function 'score'"),
        ("mine.py:score", "import nowhere", r"No module named 'nowhere' \(mine.py:1\)"),
        ("mine.py:score", "def score(text): return 1", r"score\(text\) must take response and"),
        ("gone.py:score", "", "gone.py does not exist"),
        ("mine.py", "", "is not file.py:name"),
        ("no.such.module:score", "", "No module named 'no'"),
    ],
)
def test_a_function_that_is_not_there_ends_the_run_before_it_begins(
    tmp_path: Path, name: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(RewardFunctionError, match=message):
        Verifier(RewardConfig(function=name, workers=1))


def test_repeats_are_seen() -> None:
    rng = np.random.default_rng(0)
    assert repeated(rng.integers(0, 1000, 500)) == 0.0
    assert repeated(np.tile(rng.integers(0, 1000, 50), 20)) > 0.9
    assert repeated(np.arange(3)) == 0.0


def test_the_check_tells_a_reward_that_teaches_from_one_that_does_not(tmp_path: Path, capsys):
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(tmp_path / "rows.jsonl"))
    (tmp_path / "good.py").write_text(
        "def score(response, answer): return f'{{{answer}}}' in response\n"
    )
    assert check_reward(source, f"{tmp_path}/good.py:score")
    assert "its own answer: reward 1.000 on average" in capsys.readouterr().out
    (tmp_path / "flat.py").write_text("def score(response, answer): return 0.5\n")
    assert not check_reward(source, f"{tmp_path}/flat.py:score")
    assert "nothing can be learned" in capsys.readouterr().out
    (tmp_path / "bad.py").write_text("def score(response, answer): return 1 / len(response)\n")
    assert not check_reward(source, f"{tmp_path}/bad.py:score")
    assert "8 calls failed" in capsys.readouterr().out
