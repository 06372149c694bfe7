"""Cognitive behaviours in the responses of an evaluation, and how far they have become visual.

    python -m ovr_fast.behaviours find OUT ... --output DIR [--benchmarks NAME,...]
        [--cues FILE.toml | --judge URL --judge-model NAME --data DIR] [--excerpts FILE.toml]
    python -m ovr_fast.behaviours calibrate [--cues FILE.toml | --judge URL --judge-model NAME]
        [--excerpts FILE.toml]
    python -m ovr_fast.behaviours agree DIR_A DIR_B

OUT are folders of ``ovr_fast.evaluate``, one a model (the exports of a run, say). By rules it needs
no model; a judge is any OpenAI-compatible address, and has to quote what it counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from collections.abc import Sequence as List
from pathlib import Path

from ovr_fast.behaviours.find import BehaviourError
from ovr_fast.behaviours.judge import usable
from ovr_fast.behaviours.study import (
    ByJudge,
    ByRules,
    Finder,
    agree,
    calibrate,
    calibration_table,
    find,
    table,
)
from ovr_fast.errors import OVRFastError
from ovr_fast.evaluation.asking import Asker


def finder(arguments: argparse.Namespace, memory: Path) -> tuple[Finder, Callable[[], None]]:
    """Rules or the judge, and what ends it."""
    if not arguments.judge:
        return ByRules(arguments.cues), lambda: None
    if arguments.cues:
        raise BehaviourError("--cues and --judge are two ways to find: name one")
    if not arguments.judge_model:
        raise BehaviourError("--judge needs --judge-model, the model's name there")
    asker = Asker(arguments.judge, arguments.judge_model, memory, usable=usable, max_tokens=4096)
    return ByJudge(asker), asker.close


def find_command(arguments: argparse.Namespace) -> None:
    """Find, and print the shares and rates."""
    if arguments.judge and not arguments.data:
        raise BehaviourError("--judge needs --data, the benchmarks' files: it is shown questions")
    by, close = finder(arguments, arguments.output / "answers" / "judge.jsonl")
    try:
        names = [name for name in arguments.benchmarks.split(",") if name]
        rows = find(
            by, arguments.evaluations, arguments.output, names, arguments.data, arguments.excerpts
        )
    finally:
        close()
    print(table(rows))


def calibrate_command(arguments: argparse.Namespace) -> None:
    """Sensitivity and specificity on labelled excerpts."""
    by, close = finder(arguments, arguments.memory)
    try:
        print(calibration_table(by.name, calibrate(by, arguments.excerpts)))
    finally:
        close()


def agree_command(arguments: argparse.Namespace) -> None:
    """Two studies of the same responses."""
    print(agree(*arguments.studies))


def parse(words: List[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.behaviours",
        description="Cognitive behaviours in an evaluation's responses, and their transfer.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, says in (
        ("find", find_command, "in the responses of evaluations"),
        ("calibrate", calibrate_command, "errors of rules or a judge on labelled excerpts"),
    ):
        command = commands.add_parser(name, help=says)
        command.set_defaults(run=run)
        command.add_argument("--cues", type=Path, help="TOML like behaviours/cues.toml")
        command.add_argument("--judge", metavar="URL", help="such as http://host:8000/v1")
        command.add_argument("--judge-model", metavar="NAME", help="its name there")
        command.add_argument(
            "--excerpts", type=Path, help="labelled texts, TOML like behaviours/excerpts.toml (it)"
        )
        if name == "calibrate":
            command.add_argument(
                "--memory", type=Path, default=Path("runs/judge_calibration.jsonl"),
                help="file that keeps the judge's answers",
            )  # fmt: skip
            continue
        command.add_argument("evaluations", nargs="+", type=Path, metavar="OUT")
        command.add_argument("--output", type=Path, required=True, help="folder")
        command.add_argument("--benchmarks", default="", help="names, with commas (all)")
        command.add_argument("--data", type=Path, help="the benchmarks' files")
    command = commands.add_parser("agree", help="two studies of the same responses")
    command.set_defaults(run=agree_command)
    command.add_argument("studies", nargs=2, type=Path, metavar="DIR")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    try:
        arguments.run(arguments)
    except (OVRFastError, OSError) as error:
        sys.exit(f"ovr_fast.behaviours: {error}")


if __name__ == "__main__":
    main()
