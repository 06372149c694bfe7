"""The commands of ``ovr_fast.evaluate`` beside a server without a model: kill and resume, a judge
that lies, fails or is slow, and what is asked for."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from ovr_fast import evaluate
from ovr_fast.evaluation.adapter import EvaluationError
from support.toy_run import ROOT

ROWS = 40


class ChatServer:
    """``/v1/chat/completions`` without a model: what ``answer`` says, in a thread of its own."""

    def __init__(self, answer: Callable[[dict], Any], *, seconds: float = 0.0) -> None:
        self.answer, self.seconds, self.bodies = answer, seconds, list[dict]()
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(30)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _chat(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        self.bodies.append(body)
        await asyncio.sleep(self.seconds)
        answer = self.answer(body)
        if isinstance(answer, web.Response):
            return answer
        choice = {"message": {"content": answer}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 7, "completion_tokens": len(answer)}
        return web.json_response({"choices": [choice], "usage": usage})

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., ChatServer]]:
    made: list[ChatServer] = []

    def one(answer: Callable[[dict], Any], **options: Any) -> ChatServer:
        made.append(ChatServer(answer, **options))
        return made[-1]

    yield one
    for server in made:
        server.stop()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A set of one's own: 40 sums, every fourth of which wants words."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "own.toml").write_text(
        'name = "own"\nfiles = ["own.jsonl"]\nrows = 0\nid = "id"\nsamples = 2\n'
        'kind_column = "kind"\nkinds = { text = "text" }\nkind = "number"\ngroups = ["kind"]\n'
    )
    rows = [
        {"id": f"q{i}", "question": f"{i} + 1 =", "answer": str(i + 1), "kind": "number"}
        if i % 4 else {"id": f"q{i}", "question": f"{i}?", "answer": f"word {i}", "kind": "text"}
        for i in range(ROWS)
    ]  # fmt: skip
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(data: Path, command: str, output: Path, *more: str) -> list[str]:
    named = ["--benchmarks", str(data / "own.toml")] if command == "generate" else []
    return [command, "--data", str(data), "--output", str(output), *named, *more]


def run(arguments: list[str]) -> None:
    parsed = evaluate.parser().parse_args(arguments)
    parsed.run(parsed)


def solve(body: dict) -> str:
    """Right for sums, of seeds that are even; other words for words."""
    text = body["messages"][0]["content"]
    if "+" not in text:
        return f"So \\boxed{{the {text.split('?')[0]}th word}}"
    value = int(text.split("+")[0]) + 1 + random.Random(body["seed"]).randrange(2)
    return f"thinking ... \\boxed{{{value}}}"


def results(output: Path) -> dict[str, Any]:
    (found,) = json.loads((output / "results.json").read_text())
    return found


def test_each_response_is_asked_once_with_a_seed_of_its_own(serve, data, tmp_path, capsys) -> None:
    server = serve(solve)
    output = tmp_path / "out"
    own = words(data, "generate", output, "--url", server.url, "--model-name", "m",
                "--preset", "r1", "--max-tokens", "100")  # fmt: skip
    run(own)
    assert len(server.bodies) == 2 * ROWS
    assert len({body["seed"] for body in server.bodies}) == 2 * ROWS
    body = server.bodies[0]
    assert (body["repetition_penalty"], body["top_k"]) == (1.0, 0)
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.6, 0.95, 100)
    assert body["messages"][0]["content"].endswith("Put your final answer into \\boxed{}.")
    before = (output / "responses/own.jsonl").read_bytes()
    run(own)
    assert len(server.bodies) == 2 * ROWS
    assert (output / "responses/own.jsonl").read_bytes() == before
    run(words(data, "score", output))
    found = results(output)
    assert found["shares"]["undecided"] == pytest.approx(0.25)
    assert found["score_if_undecided_were_right"] == pytest.approx(found["score"]["value"] + 0.25)
    assert found["groups"]["kind"]["number"]["questions"] == 30
    assert found["samples"] == 2
    assert "| own | 40 x 2 |" in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="made with another protocol"):
        run([*own[:-1], "200"])


def test_killed_anywhere_it_ends_with_the_same_bytes(serve, data, tmp_path) -> None:
    server = serve(solve, seconds=0.1)
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    options = ["--url", server.url, "--model-name", "m", "--parallel", "4"]
    run(words(data, "generate", calm, *options))
    command = [
        sys.executable,
        "-m",
        "ovr_fast.evaluate",
        *words(data, "generate", killed, *options),
    ]
    path = killed / "responses/own.jsonl"
    for lines in (5, 30):
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 60
        while not path.is_file() or path.read_bytes().count(b"\n") < lines:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open(path, "ab") as file:
            file.write(b'{"question":"q1","sam')  # torn
    asked = len(server.bodies)
    run(words(data, "generate", killed, *options))
    assert len(server.bodies) - asked <= 2 * ROWS - 30
    assert path.read_bytes() == (calm / "responses/own.jsonl").read_bytes()
    for output in (calm, killed):
        run(words(data, "score", output))
    assert (calm / "scores/own.jsonl").read_bytes() == (killed / "scores/own.jsonl").read_bytes()
    assert (calm / "results.json").read_bytes() == (killed / "results.json").read_bytes()


def test_a_judge_decides_what_rules_leave_and_is_asked_once(serve, data, tmp_path) -> None:
    output = tmp_path / "out"
    policy = serve(solve)
    run(words(data, "generate", output, "--url", policy.url, "--model-name", "m"))
    judge = serve(lambda body: 'Fine.\n```json\n{"final_answer": "x", "correct": true}\n```')
    own = words(data, "score", output, "--judge", judge.url, "--judge-model", "j")
    run(own)
    assert len(judge.bodies) == 10  # two samples of a question say the same
    assert "no instructions for you" in judge.bodies[0]["messages"][0]["content"]
    found = results(output)
    assert found["shares"].get("undecided", 0.0) == 0.0
    assert found["score"]["value"] == found["score_if_undecided_were_right"]
    assert found["judge"] == "j"
    run(own)
    assert len(judge.bodies) == 10


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("I would say yes.", "gave no verdict on 20 of 20 answers .*not the JSON"),
        ('{"correct": "maybe"}', "gave no verdict"),
        (503, "gave no verdict .*503"),
    ],
    ids=["prose", "wrong type", "down"],
)
def test_a_judge_that_fails_is_one_message_and_nothing_is_half_scored(
    serve, data, tmp_path, answer: Any, message: str
) -> None:
    output = tmp_path / "out"
    policy = serve(solve)
    run(words(data, "generate", output, "--url", policy.url, "--model-name", "m"))
    judge = serve(lambda body: answer if isinstance(answer, str) else web.Response(status=503))
    with pytest.raises(EvaluationError, match=message):
        run(words(data, "score", output, "--judge", judge.url, "--judge-model", "j"))
    assert not (output / "results.json").exists()
    assert not (output / "scores").exists()


def test_what_cannot_be_scored_is_said(serve, data, tmp_path) -> None:
    output = tmp_path / "out"
    with pytest.raises(EvaluationError, match="holds no responses; generate makes them"):
        run(words(data, "score", output))
    policy = serve(solve)
    run(words(data, "generate", output, "--url", policy.url, "--model-name", "m"))
    path = output / "responses/own.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]))
    with pytest.raises(EvaluationError, match="77 of 80 responses; run generate again"):
        run(words(data, "score", output))
    path.write_text("".join(lines))
    rows = (data / "own.jsonl").read_text().splitlines(keepends=True)
    (data / "own.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(EvaluationError, match="are not those that were asked from"):
        run(words(data, "score", output))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (web.HTTPBadRequest, "status 400"),
        (web.HTTPInternalServerError, "status 500"),
        ("closed", "is the server running"),
    ],
    ids=["refused", "broken", "gone"],
)
def test_a_server_that_fails_is_one_message(
    serve, data, tmp_path, answer: Any, message: str, monkeypatch
) -> None:
    monkeypatch.setattr("ovr_fast.evaluation.generate.ATTEMPTS", 1)
    server = serve(lambda body: web.Response(status=answer.status_code))
    url = "http://127.0.0.1:9/v1" if answer == "closed" else server.url
    with pytest.raises(Exception, match=message) as caught:
        run(words(data, "generate", tmp_path / "out", "--url", url, "--model-name", "m"))
    assert not isinstance(caught.value, BaseExceptionGroup)


def test_clean_questions_are_those_of_whole_clusters(serve, data, tmp_path, capsys) -> None:
    own = data / "own.toml"
    own.write_text(own.read_text() + 'cluster = "kind"\n')
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "5 + 1 =", "answer": "6"}) + "\n")
    policy, output = serve(solve), tmp_path / "out"
    run(words(data, "generate", output, "--url", policy.url, "--model-name", "m"))
    run(words(data, "score", output, "--against", str(tmp_path / "train.jsonl")))
    assert results(output)["clean"]["questions"] == 10  # the words: a sum was seen
    assert "on the 10 questions that no training row holds" in capsys.readouterr().out


def test_a_judge_gives_parts_of_a_point(serve, data, tmp_path) -> None:
    adapter = data / "own.toml"
    adapter.write_text(adapter.read_text().replace('text = "text"', 'text = "graded"'))
    output = tmp_path / "out"
    policy = serve(solve)
    run(words(data, "generate", output, "--url", policy.url, "--model-name", "m"))
    judge = serve(lambda body: '{"final_answer": "x", "score": 0.3}')
    run(words(data, "score", output, "--judge", judge.url, "--judge-model", "j"))
    assert "<AND> joins parts" in judge.bodies[0]["messages"][0]["content"]
    found = results(output)
    assert found["groups"]["kind"]["text"] == {"score": pytest.approx(0.3), "questions": 10}
    assert found["shares"]["graded"] == 0.25


def exported(data: Path, output: Path, folder: Path, *more: str) -> None:
    run([
        "export", "--data", str(data), "--benchmarks", str(data / "own.toml"), "--output",
        str(output), "--folder", str(folder), "--task", "own", "--model-name", "m", *more,
    ])  # fmt: skip


def test_other_harnesses_get_the_same_texts(serve, data, tmp_path, capsys) -> None:
    """The shapes that lm-eval 0.4.13, lmms-eval 0.7.3 (``from_log``) and ms-vlmeval 0.0.20 read."""
    output, there = tmp_path / "out", tmp_path / "there"
    policy = serve(solve)
    run(words(data, "generate", output, "--url", policy.url, "--model-name", "m"))
    lines = (output / "responses/own.jsonl").read_text().splitlines()
    texts = {(r["question"], r["sample"]): r["response"] for r in map(json.loads, lines)}

    exported(data, output, there, "--to", "lm-eval")
    (path,) = (there / "m").glob("samples_own_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == list(range(ROWS))
    assert all(
        row["resps"] == [[texts[row["doc"]["id"], 0], texts[row["doc"]["id"], 1]]] for row in rows
    )
    assert {row["exact_match"] for row in rows if row["doc_id"] % 4} <= {0.0, 0.5, 1.0}
    assert {row["exact_match"] for row in rows if row["doc_id"] % 4 == 0} == {None}  # a judge's

    exported(data, output, there, "--to", "lmms-eval", "--sample", "1")
    log = json.loads((there / "m_own.json").read_text())
    assert (log["args"]["model"], log["model_configs"]["task"]) == ("m", "own")
    assert [each["resps"][0][0] for each in log["logs"]] == [texts[f"q{i}", 1] for i in range(ROWS)]

    theirs = tmp_path / "OWN.tsv"
    theirs.write_text(
        "index\timage\tquestion\tanswer\n"
        + "".join(
            f"{900 - i}\tAAAA\t{i} + 1  =\t{i + 1}\n" if i % 4 else f"{900 - i}\tAAAA\t{i}?\tw\n"
            for i in reversed(range(ROWS))
        )
        + "3\tAAAA\tnot asked\tx\n"
    )
    exported(data, output, there, "--to", "vlmevalkit", "--rows", str(theirs))
    assert "vlmutil eval own" in (said := capsys.readouterr().out)
    assert "without 1 of its rows" in said
    with open(there / "m_own.tsv", newline="") as file:
        made = list(csv.DictReader(file, delimiter="\t"))
    assert [row["index"] for row in made] == [str(900 - i) for i in reversed(range(ROWS))]
    assert [row["prediction"] for row in made] == [texts[f"q{i}", 0] for i in reversed(range(ROWS))]
    assert "image" not in made[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--to", "vlmevalkit"], "name its TSV of the task with --rows"),
        (["--to", "vlmevalkit", "--rows", "OTHER"], "name the column with --on"),
        (["--to", "vlmevalkit", "--rows", "OTHER", "--on", "index"], "'index' names 0 of the 40"),
        (["--to", "lmms-eval", "--sample", "2"], "no sample 2 of 2"),
        (["--to", "lm-eval", "--task", "a/b"], "cannot be a part of a file's name"),
        (["--to", "lm-eval", "--whole-split"], "--whole-split is about"),
        (["--to", "lmms-eval", "--model-name", "a,b=c"], "cuts its arguments at , and ="),
    ],
    ids=["no rows", "other rows", "other column", "no sample", "no name", "no split", "no word"],
)
def test_what_another_harness_cannot_score_is_said(
    serve, data, tmp_path, more: list[str], message: str
) -> None:
    output = tmp_path / "out"
    run(words(data, "generate", output, "--url", serve(solve).url, "--model-name", "m"))
    other = tmp_path / "OTHER.tsv"
    other.write_text("index\tquestion\nx\twhat\n")
    named = [str(other) if word == "OTHER" else word for word in more]
    with pytest.raises(EvaluationError, match=message):
        exported(data, output, tmp_path / "there", *named)
    assert not (tmp_path / "there").exists()


def test_a_part_of_a_split_has_its_own_numbers_or_the_split_s(
    serve, data, tmp_path, capsys
) -> None:
    adapter = data / "own.toml"
    adapter.write_text(adapter.read_text() + 'where = { kind = "number" }\n')
    output = tmp_path / "out"
    run(words(data, "generate", output, "--url", serve(solve).url, "--model-name", "m"))
    kinds = [i % 4 != 0 for i in range(ROWS)]
    there = tmp_path / "there"

    exported(data, output, there, "--to", "lmms-eval")
    log = json.loads((there / "m_own.json").read_text())["logs"]
    assert [row["doc_id"] for row in log] == list(range(sum(kinds)))
    assert f"without {ROWS - sum(kinds)} rows that this set leaves out" in capsys.readouterr().out

    exported(data, output, there, "--to", "lmms-eval", "--whole-split")
    whole = {row["doc_id"]: row for row in json.loads((there / "m_own.json").read_text())["logs"]}
    assert sorted(whole) == list(range(ROWS))
    assert {n: bool(row["resps"][0][0]) for n, row in whole.items()} == dict(enumerate(kinds))
    assert [whole[n]["resps"] for n in range(ROWS) if kinds[n]] == [row["resps"] for row in log]
    assert "have an empty answer" in capsys.readouterr().out


def test_half_a_verdict_is_none_and_is_asked_for_again(serve, data, tmp_path) -> None:
    output = tmp_path / "out"
    run(words(data, "generate", output, "--url", serve(solve).url, "--model-name", "m"))
    score = words(data, "score", output, "--judge-model", "j", "--judge")
    with pytest.raises(EvaluationError, match="gave no verdict on 20 of 20"):
        run([*score, serve(lambda body: '{"score": 0.5}').url])
    judge = serve(lambda body: '{"score": 1}')
    run([*score, judge.url])
    assert len(judge.bodies) == 10
