"""Everything that follows a training run, on the toy, each command printed as it is run.

    python -m ovr_fast.toy.demo --run runs/tiny --output runs/demo

Benchmarks in the official shapes; the base, the cold start and the trained model measured on them
and compared; behaviours by rules and by a judge with known errors; the report; the release; and the
released folder measured again, which must give the trained model's scores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from ovr_fast.behaviours.find import read_cues
from ovr_fast.behaviours.study import corrected_text
from ovr_fast.toy.excerpts import SHOWS, write_excerpts
from ovr_fast.toy.judge import CUES, ToyJudge, serve

HERE = Path(__file__).parent
BASE = HERE / "base_model"
MARK = ".ovr_fast_demo"
"""Only a folder with this file is made anew."""
MISS, INVENT = 0.2, 0.1
"""Errors of the toy's judge."""


class Commands:
    """Runs one after another, and says which."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self, module: str, *words: object) -> None:
        command = [module, *map(str, words)]
        seconds = time.perf_counter() - self._began
        print(f"\n[{seconds:4.0f} s] python -m {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, "-m", *command])
        if done.returncode:
            sys.exit(f"demo: {module} ended with {done.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What follows a training run, on the toy.")
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished toy run")
    parser.add_argument("--output", type=Path, required=True, help="folder, made anew")
    parser.add_argument("--questions", type=int, default=60, help="of each benchmark (60)")
    arguments = parser.parse_args()
    out: Path = arguments.output
    if out.exists() and not (out / MARK).is_file() and any(out.iterdir()):
        sys.exit(f"demo: {out} holds something else; name another --output")
    if out.resolve() in (Path.cwd(), *arguments.run.resolve().parents):
        sys.exit(f"demo: {out} holds the run; name another --output")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()
    run = Commands()
    data = out / "benchmarks"
    run("ovr_fast.toy.benchmarks", "--output", data, "--questions", arguments.questions)
    adapters = ",".join(str(path) for path in sorted(data.glob("*.toml")))

    def measure(name: str, model: Path) -> Path:
        """Responses and scores of a model."""
        folder = out / name
        run("ovr_fast.evaluate", "generate", "--data", data, "--benchmarks", adapters, "--model",
            model, "--dtype", "float32", "--samples", 2, "--output", folder)  # fmt: skip
        run("ovr_fast.evaluate", "score", "--data", data, "--output", folder)
        return folder

    trained: Path = arguments.run / "hf"
    measured = [
        measure("base", BASE),
        measure("cold_start", arguments.run / "cold_start_hf"),
        measure("trained", trained),
    ]
    run("ovr_fast.evaluate", "compare", measured[1], measured[2])
    rules, judged = out / "behaviours", out / "behaviours_judged"
    excerpts = out / "excerpts.toml"
    write_excerpts(excerpts)
    run("ovr_fast.behaviours", "find", *measured, "--cues", CUES, "--excerpts",
        excerpts, "--output", rules)  # fmt: skip
    server = serve(ToyJudge(cues=read_cues(CUES), miss=MISS, invent=INVENT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    run("ovr_fast.behaviours", "find", measured[2], "--judge", url, "--judge-model",
        "toy-judge", "--data", data, "--excerpts", excerpts, "--output", judged)  # fmt: skip
    server.shutdown()
    server.server_close()
    run("ovr_fast.behaviours", "agree", rules, judged)
    print(recovered(rules, judged))
    run("ovr_fast.report", arguments.run, "--evaluation", *measured, "--behaviours", rules,
        "--output", out / "report")  # fmt: skip
    released = out / "released"
    run("ovr_fast.release", "--models", trained, "--run", arguments.run, "--about",
        HERE / "release.toml", "--evaluation", *measured, "--behaviours", rules, "--output",
        released)  # fmt: skip
    again = measure("released_again", released)
    wrong = [
        (row["benchmark"], row["score"]["value"], other["score"]["value"])
        for row, other in zip(_results(measured[2]), _results(again), strict=True)
        if row["score"]["value"] != other["score"]["value"]
    ]
    if wrong:
        sys.exit(f"demo: the released folder scores differently: {wrong}")
    print(f"\nthe released folder scores the same; look at {out / 'report' / 'report.html'}")


def recovered(rules: Path, judged: Path) -> str:
    """A table: the rules find all that the toy's texts show; the judge, who errs, is corrected."""

    def shares(folder: Path) -> dict[str, dict]:
        rows = json.loads((folder / "behaviours.json").read_text())
        return {
            row["behaviour"]: row
            for row in rows
            if row["kind"] == "share" and row["responses"] == "trained"
        }

    truth, found = shares(rules), shares(judged)
    lines = ["", "| trained | by rules | by the judge | corrected |", "|---|---|---|---|"]
    for name in SHOWS:
        lines.append(
            f"| {name.replace('_', ' ')} | {truth[name]['value']:.1%} | "
            f"{found[name]['value']:.1%} | {corrected_text(found[name])} |"
        )
    return "\n".join(lines)


def _results(folder: Path) -> list[dict]:
    return sorted(
        json.loads((folder / "results.json").read_text()), key=lambda row: row["benchmark"]
    )


if __name__ == "__main__":
    main()
