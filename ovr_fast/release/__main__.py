"""A model to publish: averaged weights, card, results, dynamics, licences, checksums.

    python -m ovr_fast.release --models HF_DIR ... --run RUN --about release.toml --output DIR
        [--evaluation DIR ...] [--behaviours DIR ...]

``release.toml`` has what no run knows: ``name``, ``base`` and ``licence``; where wanted
``summary``, ``limits``, ``[[data]]`` with name and licence, and for model pages
``evaluations.NAME = {dataset = "...", task = "..."}``. The last --evaluation is the released
model's. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from pyarrow import ArrowInvalid

from ovr_fast.errors import OVRFastError
from ovr_fast.release.about import read_about
from ovr_fast.release.folder import release


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.release", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", type=Path, required=True, metavar="HF_DIR")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--about", type=Path, required=True, help="release.toml")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--evaluation", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument("--behaviours", nargs="+", type=Path, default=[], metavar="DIR")
    arguments = parser.parse_args()
    try:
        about = read_about(arguments.about)
        made = release(
            arguments.models, arguments.run, arguments.output, about,
            evaluations=arguments.evaluation, behaviours=arguments.behaviours,
        )  # fmt: skip
    except (OVRFastError, OSError, KeyError, ArrowInvalid) as error:
        sys.exit(f"ovr_fast.release: {error}")
    print(f"{made}: look at README.md and report/report.html, then")
    print(f"  hf upload {shlex.quote(about.name)} {shlex.quote(str(made))}")


if __name__ == "__main__":
    main()
