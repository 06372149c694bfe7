"""What one or several runs did, on one page: dynamics, evaluations, behaviours, samples, cost.

    python -m ovr_fast.report RUN ... --output DIR
        [--evaluation DIR ...] [--behaviours DIR ...] [--title TEXT]

DIR gets ``report.html``, which needs no scripts and no network, and behind its figures
``png/NAME.png`` and ``data/NAME.csv``. Runs stand side by side, a colour a run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ovr_fast.errors import OVRFastError
from ovr_fast.report.page import MOST_BYTES, write_report


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
    parser.add_argument("--title", default="", help="of the page (the runs' names)")
    arguments = parser.parse_intermixed_args()
    try:
        page = write_report(
            arguments.runs, arguments.output, evaluations=arguments.evaluation,
            behaviours=arguments.behaviours, title=arguments.title,
        )  # fmt: skip
    except (OVRFastError, OSError) as error:
        sys.exit(f"ovr_fast.report: {error}")
    size = page.stat().st_size
    print(f"{page}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        print(f"larger than {MOST_BYTES / 1e6:.0f} MB: name fewer runs, or mail its png/ instead")


if __name__ == "__main__":
    main()
