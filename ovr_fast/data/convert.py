"""Writes any file that can be read as one Parquet file of our own, with the images inside.

    python -m ovr_fast.data.convert FILE... --output NEW.parquet [--for rl|cold_start]

Rows that cannot be used end it with their name, or with ``--drop`` are left out and counted. What
is written reads back as the same prompts (columns id, prompt, images, answer, response).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from ovr_fast.data.check import NEEDS, add_source_arguments, sources_of
from ovr_fast.data.errors import DataError
from ovr_fast.data.messages import IMAGE_MARK
from ovr_fast.data.prompts import Reading, check_reading, iterate
from ovr_fast.errors import OVRFastError
from ovr_fast.records import Prompt

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("answer", pa.string()),
        ("response", pa.string()),
    ]
)
GROUP_BYTES = 64 * 2**20
"""Of a row group, which a reader holds as a whole."""


def as_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt as a row of our own."""
    messages = []
    for message in prompt.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(
                IMAGE_MARK if part["type"] == "image" else part["text"] for part in content
            )
        messages.append({"role": message["role"], "content": content})
    images = [{"bytes": image.data, "path": image.digest[:16]} for image in prompt.images]
    return {
        "id": prompt.id,
        "prompt": messages,
        "images": images,
        "answer": prompt.answer,
        "response": prompt.response,
    }


def write_prompts(prompts: Iterable[Prompt], output: Path) -> int:
    """Write prompts as a file that is there whole or not at all; returns their number.

    Raises:
        OSError: it cannot be written.
    """
    partial = output.with_name(f"{output.name}.partial")
    count = size = 0
    rows: list[dict[str, Any]] = []
    try:
        with parquet.ParquetWriter(partial, SCHEMA, compression="zstd") as file:
            for prompt in prompts:
                rows.append(as_row(prompt))
                count += 1
                size += 1000 + sum(len(image["bytes"]) for image in rows[-1]["images"])
                if size > GROUP_BYTES:
                    file.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                    rows, size = [], 0
            if rows:
                file.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.rename(output)
    return count


def prompts_of(readings: list[Reading], need: str | None) -> Iterator[Prompt]:
    """The prompts of sources, one source after the other.

    Raises:
        DataError: a row cannot be used and the source says stop, or ``check_reading`` fails.
    """
    for reading in readings:
        count = 0
        for row in iterate(reading.source, need=need, measure=None, reading=reading):
            if row.error is not None:
                if reading.source.on_bad_row == "stop":
                    raise row.error
                reading.dropped.append(str(row.error))
            elif row.prompt is not None:
                count += 1
                yield row.prompt
        check_reading(reading, count)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.data.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="Parquet file to write")
    parser.add_argument(
        "--for", dest="stage", choices=NEEDS, default="any", help="what every row must be good for"
    )
    parser.add_argument("--drop", action="store_true", help="leave out rows that cannot be used")
    arguments = parser.parse_args()
    sources = sources_of(arguments)
    if arguments.drop:
        sources = [replace(source, on_bad_row="drop", max_bad_share=1.0) for source in sources]
    readings = [Reading(source) for source in sources]
    try:
        if arguments.output.exists():
            raise DataError(f"{arguments.output} exists; remove it or choose another --output")
        count = write_prompts(prompts_of(readings, NEEDS[arguments.stage]), arguments.output)
    except (OVRFastError, OSError) as error:
        sys.exit(f"convert: {error}")
    for reading in readings:
        print(reading.describe())
    print(f"{arguments.output}: {count:,} rows")


if __name__ == "__main__":
    main()
