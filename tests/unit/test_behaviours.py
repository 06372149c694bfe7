"""Behaviours: cues, a judge that must quote, rates and their intervals."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ovr_fast.behaviours import __main__ as command
from ovr_fast.behaviours import rates
from ovr_fast.behaviours.find import (
    BEHAVIOURS,
    BehaviourError,
    by_rules,
    definitions,
    read_cues,
    sentences,
)
from ovr_fast.behaviours.judge import WINDOW, by_judge, locate, merged, parse, prompts, usable
from ovr_fast.behaviours.study import ByJudge, ByRules, agree, calibrate, find, read_excerpts
from ovr_fast.evaluation import records
from ovr_fast.evaluation.asking import Asker
from ovr_fast.evaluation.records import ResponseRecord
from ovr_fast.toy.data import questions
from ovr_fast.toy.excerpts import SHOWS, write_excerpts
from ovr_fast.toy.judge import ToyJudge, serve

TOY_CUES = Path("ovr_fast/toy/cues.toml")
PARTS = "I see: top - b . Digits: top - b . 1 , middle - . 0 . Add: 1 + 0 = 1 . \\boxed{1}"
PLAIN = "I see: top - b . The answer is two."


@contextmanager
def served(judge: ToyJudge, memory: Path) -> Iterator[Asker]:
    server = serve(judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    asker = Asker(f"http://127.0.0.1:{server.server_address[1]}/v1", "toy", memory, usable=usable)
    try:
        yield asker
    finally:
        asker.close()
        server.shutdown()
        server.server_close()
        thread.join()


def responses(folder: Path, texts: list[str], *, samples: int = 1) -> Path:
    """An evaluation's folder with these responses to one benchmark."""
    rows = [
        ResponseRecord(
            question=str(n), sample=sample, seed=0, prompt_sha256="", order=(), response=text,
            finish_reason="stop", prompt_tokens=1, response_tokens=1,
        )
        for n, text in enumerate(texts)
        for sample in range(samples)
    ]  # fmt: skip
    records.write_records(folder / "responses/mathvision_mini.jsonl", rows)
    manifest = {"adapter": _adapter(), "limit": 0, "settings": {"samples": samples}}
    path = folder / "responses/mathvision_mini.json"
    path.write_text(json.dumps(manifest))
    return folder


def _adapter() -> dict:
    import msgspec

    from ovr_fast.evaluation.adapter import load_adapter

    return msgspec.to_builtins(load_adapter("mathvision_mini"))


def test_every_behaviour_is_defined_has_cues_and_twenty_excerpts() -> None:
    assert set(definitions()) == set(BEHAVIOURS)
    assert set(read_cues().by_behaviour) == set(BEHAVIOURS)
    found = calibrate(ByRules())
    assert set(found) == set(BEHAVIOURS)
    for errors in found.values():
        assert (errors.positives, errors.negatives) == (10, 10)
        # Cues that are worse than a coin tell nothing.
        assert errors.sensitivity + errors.specificity > 1.2


def test_sentences_cover_the_text() -> None:
    text = 'So x = 3.5. Then "y" is 2! Is it?\nYes'
    assert [text[a:b] for a, b in sentences(text)] == [
        "So x = 3.5.", 'Then "y" is 2!', "Is it?", "Yes",
    ]  # fmt: skip
    assert sentences("") == []


def test_a_visual_cue_needs_a_picture_nearby() -> None:
    cues = read_cues()
    assert by_rules("Looking again, x is 3.", "visual_reflection", cues) == []
    near = by_rules("It is in the figure. Looking again, x is 3.", "visual_reflection", cues)
    assert [each.quote for each in near] == ["Looking again, x is 3."]
    far = "It is in the figure. It is small. Looking again, x is 3."
    assert by_rules(far, "visual_reflection", cues) == []


@pytest.mark.parametrize(
    ("quote", "found"),
    [
        ("the angle is right", "the  angle\nis right"),
        ('"the angle is right"', "the  angle\nis right"),
        ("the angle is right...", "the  angle\nis right"),
        ("(x+1)^2 = 4", "(x+1)^2 = 4"),
        ("it's", "it’s"),
        ("an", None),
        ("the angle is left", None),
        ("", None),
        ('  "" ', None),
    ],
)
def test_a_quote_is_verbatim_but_for_spaces(quote: str, found: str | None) -> None:
    text = "So the  angle\nis right, and (x+1)^2 = 4. No banana: it’s small."
    span = locate(quote, text)
    assert (span and text[slice(*span)]) == found


def test_overlapping_quotes_are_one() -> None:
    text = "a wrong step, so I go back and start over"
    from ovr_fast.behaviours.find import Instance

    spans = [(0, 12), (8, 24), (30, 40), (24, 26)]
    found = merged([Instance(start=a, end=b, quote=text[a:b]) for a, b in spans], text)
    assert [(each.start, each.end) for each in found] == [(0, 24), (24, 26), (30, 40)]
    assert found[0].quote == text[:24]


@pytest.mark.parametrize(
    ("answer", "quotes"),
    [
        ('{"instances": []}', []),
        ('```json\n{"instances": [{"quote": "a", "why": "b"}]}\n```', ["a"]),
        ('I think {so}. {"instances": [{"quote": "a"}]}', ["a"]),
        ('{"instances": [{"quote": "a"}]} I hope {this} helps.', ["a"]),
        (r"\frac{a}{b} " * 60 + '{"instances": [{"quote": "a", "why": null}]}', ["a"]),
        ('{"instances": [{"quote": "two\nlines"}]}', ["two\nlines"]),
        (r'{"instances": [{"quote": "so \sqrt{2} is wrong"}]}', [r"so \sqrt{2} is wrong"]),
        ('{"instances": "none"}', None),
        ('{"instances": [3]}', None),
        ("There are none.", None),
        ("", None),
    ],
)
def test_an_unreadable_answer_is_missing_and_not_none(
    answer: str, quotes: list[str] | None
) -> None:
    found = parse(answer)
    assert (None if found is None else [each.quote for each in found]) == quotes


def test_long_responses_are_shown_in_windows_that_share_a_part() -> None:
    text = "".join(f"{n:06d}," for n in range(WINDOW // 3))
    shown = prompts("q", text, "backtracking")
    assert len(shown) > 2
    assert all(f"{n:06d}," in "".join(p for _, p in shown) for n in range(0, WINDOW // 3, 997))
    for start, prompt in shown:
        assert text[start : start + 100] in prompt
    assert len(prompts("q", "short", "backtracking")) == 1


def test_a_judge_must_quote(tmp_path: Path) -> None:
    """Invented quotes are dropped and counted; the instances are places of the response."""
    with served(ToyJudge(cues=read_cues(TOY_CUES), lie=1.0), tmp_path / "memory") as asker:
        found = by_judge(
            asker, [("a", 0, "", PARTS), ("b", 0, "", PLAIN)], "visual_divide_and_conquer"
        )
    assert [len(each.instances) for each in found] == [1, 0]
    assert [each.unfounded for each in found] == [1, 1]
    one = found[0].instances[0]
    assert PARTS[one.start : one.end] == one.quote


class Says(ToyJudge):
    """The same answer to everything."""

    said = ""

    def answer(self, prompt: str) -> str:
        return self.said


@pytest.mark.parametrize(
    ("said", "response", "spans"),
    [
        # LaTeX in JSON: valid escapes that mean something else, and invalid ones.
        (r'{"instances": [{"quote": "\frac{1}{2} is wrong"}]}',
         r"So \frac{1}{2} is wrong.", [(3, 23)]),
        (r'{"instances": [{"quote": "\\times is wrong"}]}', r"So \times is wrong.", [(3, 18)]),
        # A sentence that stands there twice, quoted twice.
        ('{"instances": [{"quote": "No, wrong."}, {"quote": "No, wrong."}]}',
         "No, wrong. Five. No, wrong.", [(0, 10), (17, 27)]),
        ('{"instances": [{"quote": "No, wrong."}, {"quote": "No, wrong."}]}',
         "No, wrong. Five.", [(0, 10)]),
    ],
    ids=["valid escape", "doubled", "twice", "once"],
)  # fmt: skip
def test_quotes_find_their_places(
    said: str, response: str, spans: list[tuple[int, int]], tmp_path: Path
) -> None:
    judge = Says(cues=read_cues(TOY_CUES))
    object.__setattr__(judge, "said", said)
    with served(judge, tmp_path / "memory") as asker:
        found = by_judge(asker, [("a", 0, "", response)], "backtracking")[0]
    assert [(each.start, each.end) for each in found.instances] == spans
    assert found.unfounded == 0


def test_a_torn_memory_loses_one_answer(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_text('{"asked": "x", "answer": "y"}\n{"asked": "z", "ans')
    judge = ToyJudge(cues=read_cues(TOY_CUES))
    with served(judge, memory) as asker:
        by_judge(asker, [("a", 0, "", PARTS)], "verification")
    rows = [json.loads(line) for line in memory.read_text().splitlines()]
    assert len(rows) == 2


def test_an_empty_response_shows_nothing(tmp_path: Path) -> None:
    with served(ToyJudge(cues=read_cues(TOY_CUES), invent=1.0), tmp_path / "memory") as asker:
        found = by_judge(asker, [("a", 0, "", ""), ("b", 0, "", PLAIN)], "verification")
    assert [len(each.instances) for each in found] == [0, 1]


def test_no_excerpt_is_an_example_of_the_prompt() -> None:
    import tomllib

    excerpts = tomllib.loads(Path("ovr_fast/behaviours/excerpts.toml").read_text())
    shown = {text for about in definitions().values() for text in about.values()}
    known = {text for each in excerpts.values() for part in each.values() for text in part}
    assert len(known) == 160
    assert shown.isdisjoint(known)


def test_long_responses_are_not_corrected(tmp_path: Path) -> None:
    """The errors are of excerpts: over a long response false positives add up."""
    short = responses(tmp_path / "short", ["Checking this: 3 + 4 is 7."] * 3)
    long = responses(tmp_path / "long", ["Checking this: 3 + 4 is 7. " * 40] * 3)
    rows = find(ByRules(), [short, long], tmp_path / "study", [], None)
    by = {(row["responses"], row["behaviour"]): row for row in rows}
    assert by["short", "verification"]["corrected"] is not None
    assert by["long", "verification"]["corrected"] is None


def test_the_correction_recovers_a_judge_with_known_errors(tmp_path: Path) -> None:
    """A fifth of what is there is missed, a tenth of the others made up."""
    rng = np.random.default_rng(0)
    truth = rng.random(1500) < 0.3
    texts = [f"{PARTS if shown else PLAIN} {n}" for n, shown in enumerate(truth)]
    judge = ToyJudge(cues=read_cues(TOY_CUES), miss=0.2, invent=0.1)
    with served(judge, tmp_path / "memory") as asker:
        wanted = [(str(n), 0, "", text) for n, text in enumerate(texts)]
        found = by_judge(asker, wanted, "visual_divide_and_conquer")
    hits = np.array([bool(each.instances) for each in found])
    known = rates.Accuracy(sensitivity=0.8, specificity=0.9, positives=10**6, negatives=10**6)
    assert abs(hits.mean() - (0.8 * truth.mean() + 0.1 * (1 - truth.mean()))) < 0.03
    assert hits.mean() > truth.mean() + 0.005
    fair = rates.corrected(int(hits.sum()), len(hits), known)
    assert fair.value == pytest.approx(truth.mean(), abs=0.04)
    assert fair.low < truth.mean() < fair.high


def test_a_judge_is_corrected_by_excerpts_in_the_responses_own_idiom(tmp_path: Path) -> None:
    """Those of the toy: of its texts the toy's rules find all, and the shipped excerpts nothing."""
    excerpts = tmp_path / "excerpts.toml"
    write_excerpts(excerpts)
    rules = calibrate(ByRules(TOY_CUES), excerpts)
    assert set(rules) == set(SHOWS)
    assert {(e.sensitivity, e.specificity) for e in rules.values()} == {(1.0, 1.0)}
    shows, near = (
        [
            question.reasoning
            for question in questions(count, difficulty=1, held_out=True, families=families, seed=9)
        ]
        for count, families in ((120, ("count", "digit_sum")), (200, ("locate", "digit_compare")))
    )
    made = responses(tmp_path / "made", [*shows, *near])
    with served(
        ToyJudge(cues=read_cues(TOY_CUES), miss=0.2, invent=0.1), tmp_path / "memory"
    ) as asker:
        rows = find(ByJudge(asker), [made], tmp_path / "study", [], None, excerpts)
    row = next(row for row in rows if row["behaviour"] == "subgoal_setting")
    assert row["sensitivity"] == pytest.approx(0.8, abs=0.1)
    assert row["specificity"] == pytest.approx(0.9, abs=0.1)
    assert row["corrected"] == pytest.approx(120 / 320, abs=0.12)
    assert row["corrected_low"] < 120 / 320 < row["corrected_high"]
    other = next(row for row in rows if row["behaviour"] == "verification")
    assert other["corrected"] is None is other["sensitivity"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[verification]\nshows = ['a']", "near"),
        ("[verification]\nshows = ['a']\nnear = []", "length"),
        ("[verification]\nshows = ['a']\nnear = ['b']\nmore = 1", "more"),
        ("[reflection]\nshows = ['a']\nnear = ['b']", "no behaviours: reflection"),
        ("verification = 3", "Excerpts|object"),
        ("[", "excerpts.toml"),
    ],
)
def test_wrong_excerpts(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(BehaviourError, match=message):
        read_excerpts(path)


def test_a_judge_that_does_not_answer_stops_and_what_it_said_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovr_fast.evaluation.asking.ATTEMPTS", 1)
    asked: list[str] = []

    class Half(ToyJudge):
        def answer(self, prompt: str) -> str:
            asked.append(prompt)
            return "no JSON" if "bad" in prompt else super().answer(prompt)

    judge = Half(cues=read_cues(TOY_CUES))
    wanted = [("a", 0, "", PARTS), ("b", 0, "", "bad"), ("c", 0, "", "bad too")]
    for _ in range(2):
        with (
            served(judge, tmp_path / "memory") as asker,
            pytest.raises(BehaviourError, match="2 of 3 responses"),
        ):
            by_judge(asker, wanted, "visual_divide_and_conquer")
    assert len(asked) == 5  # the good one once, the others twice


def test_a_dead_judge_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovr_fast.evaluation.asking.ATTEMPTS", 1)
    asker = Asker("http://127.0.0.1:9/v1", "nobody", tmp_path / "memory", usable=usable)
    with pytest.raises(BehaviourError, match="nobody"):
        by_judge(asker, [("a", 0, "", PARTS)], "verification")
    asker.close()


def test_shares() -> None:
    assert rates.share(0, 304).low == 0.0
    assert rates.share(304, 304).high == 1.0
    one = rates.share(1, 304)  # Beta(1.5, 303.5)
    assert one.low == pytest.approx(0.00035, abs=1e-4)
    assert one.high == pytest.approx(0.0153, abs=1e-3)
    assert math.isnan(rates.share(0, 0).value)


@pytest.mark.parametrize(
    ("visual", "linguistic", "traces"), [(0.171, 0.99, 304), (0.010, 0.04, 304), (0.5, 0.6, 100)]
)
def test_the_interval_of_a_transfer_rate_holds_the_truth(
    visual: float, linguistic: float, traces: int
) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    draws = 300
    for _ in range(draws):
        a, b = rng.random(traces) < visual, rng.random(traces) < linguistic
        found = rates.transfer(list(a), list(b))
        hits += found.low <= visual / linguistic <= found.high
    assert 0.92 <= hits / draws <= 0.985


def test_the_estimate_is_in_its_interval() -> None:
    found = rates.transfer([False] * 304, [True] * 40 + [False] * 264)
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high > 0.05


def test_no_linguistic_response_has_no_rate() -> None:
    assert math.isnan(rates.transfer([True, False], [False, False]).value)


def test_agreement_where_all_show_it() -> None:
    """Kappa collapses at a prevalence of 99 %, AC1 does not."""
    a = [True] * 98 + [True, False]
    b = [True] * 98 + [False, True]
    same, kappa, ac1 = rates.agreement(a, b)
    assert (same, round(kappa, 2), round(ac1, 2)) == (0.98, -0.01, 0.98)
    assert rates.agreement([True, False], [True, False]) == (1.0, 1.0, 1.0)


def test_a_useless_judge_corrects_nothing() -> None:
    coin = rates.Accuracy(sensitivity=0.5, specificity=0.5, positives=10, negatives=10)
    assert rates.corrected(50, 100, coin) is None
    good = rates.Accuracy(sensitivity=0.9, specificity=0.9, positives=10, negatives=10)
    assert rates.corrected(5, 100, good).value == 0.0
    assert rates.corrected(0, 0, good) is None


@pytest.mark.parametrize(("truth", "traces", "excerpts"), [(0.52, 252, 100), (0.05, 300, 10)])
def test_the_interval_of_a_corrected_share_holds_the_truth(
    truth: float, traces: int, excerpts: int
) -> None:
    """Also what is not known of the judge is in it: the share's own interval alone would not."""
    rng = np.random.default_rng(0)
    found, naive, draws = 0, 0, 300
    for _ in range(draws):
        shown = int(rng.binomial(traces, 0.8 * truth + 0.1 * (1 - truth)))
        hits, spared = rng.binomial(excerpts, 0.8), rng.binomial(excerpts, 0.9)
        judge = rates.Accuracy(
            sensitivity=hits / excerpts, specificity=spared / excerpts, positives=excerpts,
            negatives=excerpts,
        )  # fmt: skip
        fair, own = rates.corrected(shown, traces, judge), rates.share(shown, traces)
        found += fair is None or fair.low <= truth <= fair.high
        naive += own.low <= truth <= own.high
    assert found / draws >= 0.93
    assert naive / draws < 0.8


def test_variants_of_a_question_count_once(tmp_path: Path) -> None:
    folder = responses(tmp_path / "model", [PARTS] * 6)
    (name,) = (path.stem for path in (folder / "responses").glob("*.jsonl"))
    ids = [json.loads(line)["question"]
           for line in (folder / f"responses/{name}.jsonl").read_text().splitlines()]  # fmt: skip
    rows = find(ByRules(TOY_CUES), [folder], tmp_path / "alone", [], None)
    assert rows[0]["traces"] == 6
    (folder / "scores").mkdir()
    clusters = {question: str(place // 3) for place, question in enumerate(ids)}
    (folder / f"scores/{name}.json").write_text(json.dumps({"clusters": clusters}))
    rows = find(ByRules(TOY_CUES), [folder], tmp_path / "together", [], None)
    assert rows[0]["traces"] == 2
    path = folder / f"responses/{name}.json"
    manifest = json.loads(path.read_text())
    manifest["adapter"]["cluster"] = "seed"
    path.write_text(json.dumps(manifest))
    (folder / f"scores/{name}.json").unlink()
    with pytest.raises(BehaviourError, match="belong together, and no scores say which"):
        find(ByRules(TOY_CUES), [folder], tmp_path / "unknown", [], None)


def test_a_study_of_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = responses(tmp_path / "early", [PARTS] * 12 + [PLAIN] * 28)
    late = responses(tmp_path / "late", [PARTS] * 30 + [PLAIN] * 10, samples=2)
    arguments = command.parse([
        "find", str(early), str(late), "--output", str(tmp_path / "study"), "--cues", str(TOY_CUES),
    ])  # fmt: skip
    arguments.run(arguments)
    said = capsys.readouterr().out
    assert "| late | visual divide and conquer | 75.0% |" in said
    assert "not estimable" in said
    rows = json.loads((tmp_path / "study/behaviours.json").read_text())
    assert len(rows) == 2 * (8 + 4)
    by = {(row["responses"], row["behaviour"]): row for row in rows}
    assert by["early", "visual_divide_and_conquer"]["shown"] == 12
    assert by["late", "visual_divide_and_conquer"]["traces"] == 40  # one response a question
    pair = by["late", "visual_divide_and_conquer / subgoal_setting"]
    assert (pair["visual"], pair["linguistic"], pair["value"]) == (30, 30, 1.0)
    assert by["late", "visual_reflection / backtracking"]["value"] is None
    # The same judge agrees with itself; with one that misses, less.
    with served(ToyJudge(cues=read_cues(TOY_CUES), miss=0.5), tmp_path / "memory") as asker:
        rows = find(ByJudge(asker), [late], tmp_path / "judged", [], None)
    assert rows[0]["self_agreement"] == 1.0
    table = agree(tmp_path / "study", tmp_path / "judged")
    line = next(line for line in table.splitlines() if "divide" in line)
    assert "| late |" in line
    assert "100.0%" not in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["find", "OUT", "--output", "S", "--judge", "http://h", "--judge-model", "m"], "--data"),
        (["find", "OUT", "--output", "S", "--judge", "http://h", "--data", "d"], "--judge-model"),
        (["find", "OUT", "OUT", "--output", "S"], "one name"),
        (["find", "EMPTY", "--output", "S"], "no responses"),
        (["find", "OUT", "--output", "S", "--benchmarks", "aime24"], "no responses to aime24"),
        (["find", "OUT", "--output", "S", "--cues", "BAD"], "no behaviours: courage"),
        (["find", "OUT", "--output", "S", "--cues", "WORSE"], "unterminated"),
        (["find", "OUT", "--output", "S", "--cues", "NONE"], "NONE"),
        (["find", "OUT", "--output", "S", "--cues", "TEXT"], "must be a list"),
        (["find", "CUT", "--output", "S"], "1 responses, and not 2 to each"),
        (["agree", "OUT", "EMPTY"], "no responses in common"),
    ],
    ids=lambda value: "-".join(value[-2:]) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_ends_with_one_message(words: list[str], says: str, tmp_path: Path) -> None:
    responses(tmp_path / "OUT", [PLAIN])
    (tmp_path / "EMPTY").mkdir()
    cut = responses(tmp_path / "CUT", [PLAIN], samples=2) / "responses/mathvision_mini.jsonl"
    cut.write_text(cut.read_text().splitlines()[0] + "\n")
    (tmp_path / "TEXT").write_text("picture = 'x'\n[cues]\nverification = 'wrong'\n")
    (tmp_path / "BAD").write_text("picture = 'x'\n[cues]\ncourage = ['x']\n")
    (tmp_path / "WORSE").write_text("picture = 'x'\n[cues]\nverification = ['[']\n")
    words = [str(tmp_path / word) if word.isupper() else word for word in words]
    arguments = command.parse(words)
    with pytest.raises(Exception, match=says) as found:
        arguments.run(arguments)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "S" / "behaviours.json").exists()
