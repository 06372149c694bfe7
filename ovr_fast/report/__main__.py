"""What one or several runs did, on one page: dynamics, evaluations, behaviours, samples, cost.

    python -m ovr_fast.report RUN ... --output DIR
        [--evaluation DIR ...] [--behaviours DIR ...] [--axis tokens]
        [--group ppo=ppo_0,ppo_1,ppo_2 ...] [--title TEXT]

DIR gets ``report.html``, which needs no scripts and no network, and behind its figures
``png/NAME.png`` and ``data/NAME.csv``. Runs stand side by side, a colour a run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ovr_fast.errors import OVRFastError
from ovr_fast.report.figures import AXES
from ovr_fast.report.page import MOST_BYTES, write_report


def _group(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, runs = text.partition("=")
    if not (name and equals and all(runs.split(","))):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RUN,RUN")
    return name, tuple(runs.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.report",
        description="What one or several runs did, on one page without scripts.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, required=True, help="folder for the report")
    parser.add_argument(
        "--evaluation", nargs="+", type=Path, default=[], metavar="DIR",
        help="folders of ovr_fast.evaluate, scored",
    )  # fmt: skip
    parser.add_argument(
        "--behaviours", nargs="+", type=Path, default=[], metavar="DIR",
        help="folders of ovr_fast.behaviours",
    )  # fmt: skip
    parser.add_argument(
        "--axis",
        choices=sorted(AXES),
        default="steps",
        help="of a stage's curves; tokens: of responses",
    )
    parser.add_argument(
        "--group", action="append", default=[], metavar="NAME=RUN,RUN", type=_group,
        help="runs, by their folders' names, drawn as their mean and range; repeatable",
    )  # fmt: skip
    parser.add_argument("--title", default="", help="of the page (the runs' names)")
    arguments = parser.parse_intermixed_args()
    names = [name for name, _ in arguments.group]
    if len(set(names)) < len(names):
        parser.error(f"--group: two have one name: {', '.join(names)}")
    try:
        page = write_report(
            arguments.runs, arguments.output, evaluations=arguments.evaluation,
            behaviours=arguments.behaviours, title=arguments.title, axis=arguments.axis,
            groups=dict(arguments.group),
        )  # fmt: skip
    except (OVRFastError, OSError) as error:
        sys.exit(f"ovr_fast.report: {error}")
    size = page.stat().st_size
    print(f"{page}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        print(f"larger than {MOST_BYTES / 1e6:.0f} MB: name fewer runs, or mail its png/ instead")


if __name__ == "__main__":
    main()
