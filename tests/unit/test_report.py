"""The report: what is on the page, what is behind it, and folders that hold something else."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ovr_fast.observe.meanings import METRICS
from ovr_fast.report.figures import PANELS, number_axis
from ovr_fast.report.page import write_report
from ovr_fast.report.runs import ReportError, differing, read_run
from ovr_fast.report.samples import choose, repeated
from unit.test_evaluation import folder_of

VOID = {"meta", "img", "br", "link"}


def a_run(folder: Path, *, steps: int = 6, lr: float = 1e-3, picture: bool = True) -> Path:
    """A run's folder, as small as one gets."""
    folder.mkdir(parents=True)
    rows: list[dict] = [{"stage": "base", "step": 0, "eval/images/accuracy": 0.0}]
    rows += [
        {"stage": "cold_start", "step": n, "cold_start/loss": 3.0 / n, "time/update_s": 1.0,
         "time/step_s": 1.0} for n in range(1, steps)
    ]  # fmt: skip
    rows[-1]["eval/images/accuracy"] = 0.4
    for n in range(1, steps):
        rows.append({
            "stage": "rl", "step": n, "rollout/reward": n / 10, "reward/correct": n / 10,
            "reward/wrong": 1 - n / 10, "reward/timeout": 0.0, "rollout/length_tokens": 20.0 + n,
            "rollout/logprob_gap": 1e-7, "rollout/kl": 0.0, "critic/explained_variance": 0.1,
            "rollout/response_tokens": 100.0, "time/generate_s": 2.0, "time/actor_s": 1.0,
            "time/step_s": 3.5,
        })  # fmt: skip
    rows[-1] |= {"eval/images/accuracy": 0.7, "eval/images/error": 0.03}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(
        f'[run]\nname = "{folder.name}"\n[model]\npath = "base"\n[evaluation]\nprompts = 200\n'
        f"[rl.actor]\nlr = {lr}\n"
    )
    (folder / "env.json").write_text(json.dumps({"commit": "c" * 40, "world": 1, "devices": []}))
    if picture:
        (folder / "pictures").mkdir()
        Image.new("RGB", (8, 8), "red").save(folder / "pictures/aa.jpg")
    rollouts = [
        {"stage": "rl", "step": n, "id": "same" if n in (1, steps - 1) else f"q{n}",
         "prompt": [{"role": "user", "content": [{"type": "image"},
                                                 {"type": "text", "text": "How many <b>?"}]}],
         "images": ["data/x.parquet:row 1"], "pictures": ["pictures/aa.jpg"] if picture else [],
         "response": f"step {n}: \\boxed{{1}}", "answer": "1",
         "outcome": "correct" if n % 2 else "wrong", "reward": float(n % 2),
         "length_tokens": 10 + n}
        for n in range(1, steps)
    ]  # fmt: skip
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    return folder


class Page(HTMLParser):
    """Its tags, and whether they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.seen if name == tag]


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    page = write_report([a_run(tmp_path / "one")], tmp_path / "out")
    text = page.read_text()
    parsed = Page(text)
    assert parsed.all("script") == []
    assert parsed.all("link") == []
    sources = [each.get("src", "") for each in parsed.all("img")]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    for each in parsed.all("a"):
        assert each["href"].startswith("#") or (tmp_path / "out" / each["href"]).is_file()
    for anchor in re.findall(r'href="#([^"]+)"', text):
        assert f'id="{anchor}"' in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert "How many &lt;b&gt;?" in text
    assert "#fe00fd" not in text  # every colour is the page's
    assert "var(--c0)" in text
    assert "mathdefault" not in text  # the labels of a logarithmic axis are numbers
    assert "1e\N{MINUS SIGN}07" in text
    assert str(tmp_path) not in text.replace("settings of", "")


def test_a_logarithmic_axis_of_less_than_a_decade_has_numbers() -> None:
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter

    matplotlib.use("Agg")
    _, axes = pyplot.subplots()
    axes.plot([1, 2], [2e-4, 8e-4])
    number_axis(axes)
    axes.figure.canvas.draw()
    assert isinstance(axes.yaxis.get_major_formatter(), LogFormatter)
    assert any(label.get_text() for label in axes.get_yticklabels(minor=True))


def test_the_numbers_are_behind_the_figures(tmp_path: Path) -> None:
    write_report([a_run(tmp_path / "one")], tmp_path / "out")
    names = {path.stem for path in (tmp_path / "out/data").iterdir()}
    assert names == {path.stem for path in (tmp_path / "out/png").iterdir()}
    assert {"reward", "outcomes", "length", "gap", "phases", "accuracy_1_images"} <= names
    assert "entropy" not in names  # nothing was measured
    with open(tmp_path / "out/data/outcomes.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["curve"] for row in rows} == {"correct", "wrong"}  # no timeout in any step
    assert [float(row["value"]) for row in rows if row["curve"] == "correct"] == [
        0.1, 0.2, 0.3, 0.4, 0.5,
    ]  # fmt: skip
    with open(tmp_path / "out/data/accuracy_1_images.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert (last["stage"], float(last["accuracy"])) == ("rl", 0.7)
    assert float(last["error"]) == 0.03


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "one"), a_run(tmp_path / "two", lr=2e-3, steps=9)]
    text = write_report(runs, tmp_path / "out").read_text()
    with open(tmp_path / "out/data/reward.csv") as file:
        assert {row["curve"] for row in csv.DictReader(file)} == {"one", "two"}
    assert differing([read_run(run) for run in runs]) == [
        ("run.name", ["one", "two"]), ("rl.actor.lr", ["0.001", "0.002"]),
    ]  # fmt: skip
    assert "rl.actor.lr" in text


def test_a_group_is_a_curve_with_a_range_over_steps_or_tokens(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name, steps=n) for name, n in (("a", 6), ("b", 5), ("c", 6))]
    for place, run in enumerate(runs[:2]):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            if row["stage"] == "rl":
                row["rollout/reward"] += 0.2 * place
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = {"both": ("a", "b")}
    write_report(runs, tmp_path / "out", axis="tokens", groups=groups)
    with open(tmp_path / "out/data/reward.csv") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["curve"] == "both"]
    assert [row["step"] for row in own] == ["1", "2", "3", "4"]  # that both have
    assert [float(row["place"]) for row in own] == [100.0, 200.0, 300.0, 400.0]
    assert [float(row["value"]) for row in own] == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert [float(row["least"]) for row in own] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert len([row for row in rows if row["curve"] == "c"]) == 5
    for wrong, message in (
        ({"both": ("a", "z")}, "names 'z'"), ({"x": ("a",), "y": ("a",)}, "in two groups"),
        ({"c": ("a", "b")}, "name of a run outside"),
    ):  # fmt: skip
        with pytest.raises(ReportError, match=message):
            write_report(runs, tmp_path / "other", groups=wrong)
    assert not (tmp_path / "other").exists()


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one")
    pages = [write_report([run], tmp_path / name).read_text() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_evaluations_and_behaviours(tmp_path: Path) -> None:
    """Also where a rate could not be estimated and an error is not a number."""
    score = {"value": 0.5, "error": None, "low": None, "high": None, "clusters": 1}
    result = {"benchmark": "aime24", "questions": 1, "samples": 1, "score": score,
              "sampling_error": None, "response_tokens": 9.0, "protocol": "abc"}  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model/results.json").write_text(json.dumps([result]))
    common = {"responses": "model", "judge": "rules", "low": None, "high": None, "traces": 3}
    share = {**common, "kind": "share", "behaviour": "verification", "value": None,
             "corrected": None, "mean_count": 0.0}  # fmt: skip
    pair = {**common, "kind": "transfer", "behaviour": "visual_verification / verification",
            "value": None, "visual": 0, "linguistic": 0,
            "note": "not estimable: too few"}  # fmt: skip
    (tmp_path / "study").mkdir()
    (tmp_path / "study/behaviours.json").write_text(json.dumps([share, pair]))
    text = write_report(
        [a_run(tmp_path / "one")], tmp_path / "out", evaluations=[tmp_path / "model"],
        behaviours=[tmp_path / "study"],
    ).read_text()  # fmt: skip
    Page(text)
    for words in ("aime24", "visual verification / verification", "not estimable: too few"):
        assert words in text


def test_what_two_evaluations_and_two_analyses_differ_in_is_said(tmp_path: Path) -> None:
    evaluations = [
        folder_of(tmp_path, "cold", ["correct"] * 10 + ["wrong"] * 20),
        folder_of(tmp_path, "trained", ["correct"] * 18 + ["wrong"] * 12),
        folder_of(tmp_path, "other", ["wrong"] * 30, protocol="q"),
    ]
    score = {"value": 0.5, "error": 0.1, "low": 0.3, "high": 0.7, "clusters": 30}
    result = {"benchmark": "aime24", "questions": 30, "samples": 1, "score": score,
              "sampling_error": None, "response_tokens": 9.0, "protocol": "p"}  # fmt: skip
    for folder in evaluations:
        (folder / "results.json").write_text(json.dumps([result]))
    common = {"responses": "trained", "low": 0.1, "high": 0.9, "traces": 3, "kind": "share",
              "behaviour": "verification", "value": 0.5, "corrected": 0.4,
              "mean_count": 0.5}  # fmt: skip
    for judge, shown in (("rules", [1, 0, 2]), ("model", [2, 1, 3])):
        study = tmp_path / judge
        study.mkdir()
        (study / "behaviours.json").write_text(json.dumps([{**common, "judge": judge}]))
        (study / "trained.jsonl").write_text("".join(
            json.dumps({"question": f"q{n}", "sample": 0, "behaviour": "verification",
                        "instances": [{"start": 0, "end": 5, "quote": f"check {judge}"}] * count})
            + "\n" for n, count in enumerate(shown)
        ))  # fmt: skip
    text = write_report(
        [a_run(tmp_path / "one")], tmp_path / "out", evaluations=evaluations,
        behaviours=[tmp_path / "rules", tmp_path / "model"],
    ).read_text()  # fmt: skip
    Page(text)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    at = cells.index("cold to trained")
    assert cells[at : at + 3] == ["cold to trained", "+26.7", "+10.6 to +42.8"]
    assert cells[at + 3 : at + 5] == ["0.008", "8 · 0"]  # the only comparison: nothing to correct
    assert any("trained and other were made with another protocol" in cell for cell in cells)
    at = cells.index("66.7%")
    assert cells[at + 3] == "1"  # their counts are in one order
    assert "trained: q1" in cells
    assert cells[cells.index("trained: q1") + 2 :][:2] == ["-", "check model"]
    assert str(tmp_path) not in text


def test_samples_are_chosen_once_each_with_a_question_over_time(tmp_path: Path) -> None:
    found = choose(read_run(a_run(tmp_path / "one")))
    reasons = [sample.why for sample in found]
    assert reasons[:2] == ["one question, early", "the same question, late"]
    assert (found[0].step, found[1].step) == (1, 5)
    assert len({(s.step, s.response) for s in found}) == len(found)
    assert {"correct", "wrong"} <= {sample.outcome for sample in found}
    bare = choose(read_run(a_run(tmp_path / "old", picture=False)))
    assert bare[0].pictures == []
    assert bare[0].origins == ["data/x.parquet:row 1"]


def test_repetition_of_words() -> None:
    assert repeated("a b c") == 0.0
    assert repeated(" ".join(str(n) for n in range(100))) == 0.0
    assert repeated("again and " * 50) > 0.9


def test_every_curve_is_of_a_metric() -> None:
    drawn = {metric for panel in PANELS for metric in panel.metrics}
    assert {name for name in drawn if not name.startswith("reward/")} <= set(METRICS)


@pytest.mark.parametrize("name", ["a$b_{$", "$x$", "_under", "a & <b>", "数学"])
def test_names_are_names(name: str, tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name), a_run(tmp_path / "other")]
    text = write_report(runs, tmp_path / "out").read_text()
    Page(text)
    with open(tmp_path / "out/data/reward.csv") as file:
        assert {row["curve"] for row in csv.DictReader(file)} == {name, "other"}
    svg = text[text.index('id="figure-reward"') :]
    assert name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in (
        svg[: svg.index("</svg>")].replace("\u200b", "")
    )


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one")
    bad = {"stage": "rl", "step": 6, "rollout/reward": float("nan"), "time/step_s": None,
           "eval/images/accuracy": None, "eval/sum/accuracy": 1987.3}  # fmt: skip
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(bad) + "\n")
    (run / "env.json").write_text(json.dumps({"commit": None}))
    with open(run / "rollouts.jsonl", "a") as file:
        row = {"stage": "rl", "step": 6, "response": "\ud800", "reward": None, "prompt": "x"}
        file.write(json.dumps(row) + "\n")
        file.write(json.dumps({**row, "response": None}) + "\n")
    text = write_report([run], tmp_path / "out").read_text()
    assert not re.search(r"\bnan\b", re.sub(r"<[^>]*>", " ", text).lower())
    assert "1,987.3" in text


def test_sets_whose_names_differ_by_signs_have_figures_of_their_own(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one")
    with open(run / "metrics.jsonl", "a") as file:
        row = {"stage": "rl", "step": 6, "eval/A-b/accuracy": 0.1, "eval/a_b/accuracy": 0.2}
        file.write(json.dumps(row) + "\n")
    text = write_report([run], tmp_path / "out").read_text()
    ids = re.findall(r' id="([^"]+)"', re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    assert len(ids) == len(set(ids))
    assert len(list((tmp_path / "out/data").glob("accuracy_*"))) == 3


def test_sampling_alone_has_its_curves(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        rows = [{**row, "stage": "rollout"} for row in rows if row["stage"] == "rl"]
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report([run], tmp_path / "out").read_text()
    assert (tmp_path / "out/data/outcomes.csv").is_file()
    assert "sampling step" in text
    assert 'class="sample"' in text


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no step yet"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n{}\n"), "metrics.jsonl:1"),
        (lambda run: (run / "config.toml").write_text("x ="), "config.toml"),
        (lambda run: (run / "config.toml").unlink(), "config.toml"),
        (lambda run: (run / "rollouts.jsonl").write_text("[]\n{}\n"), "rollouts.jsonl:1"),
        (lambda run: (run / "metrics.jsonl").write_text('{"stage": "x", "step": 1}\n'), "no run"),
    ],
    ids=["no metrics", "no step", "no row", "no toml", "no config", "no rollout", "no stage"],
)
def test_a_folder_that_is_no_run_is_named(spoil, says: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "one")
    spoil(run)
    with pytest.raises(ReportError, match=re.escape(says)) as found:
        write_report([run], tmp_path / "out")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run = a_run(tmp_path / "one")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "rl", "st')
    assert read_run(run).rows[-1]["step"] == 5
    write_report([run], tmp_path / "out")


def test_the_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ovr_fast.report"]
    run = a_run(tmp_path / "one")
    done = subprocess.run(
        [*words, run, "--output", tmp_path / "out"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    for more, says in (
        ([run], "one name"),
        (["--evaluation", tmp_path], "results.json"),
        (["--behaviours", tmp_path], "behaviours.json"),
    ):
        done = subprocess.run(
            [*words, run, *more, "--output", tmp_path / "no"], capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr
