"""Uniform average of models: the mean of each weight over Hugging Face folders.

    python -m ovr_fast.average DIR DIR... --output HF_DIR

The paper's final model is the mean of several intermediate checkpoints (OVR, section 4.1). A run
writes folders to average with ``run.export_every``. Reads one tensor of each folder at a time and
adds in float32; the result has the dtype, tokenizer and settings of the first folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence as List
from pathlib import Path

from ovr_fast.errors import ModelError, OVRFastError
from ovr_fast.model.hf_weights import HFReader, ShardWriter, parameter_table
from ovr_fast.shape.model_shape import read_shape


def average(folders: List[Path], output: Path) -> None:
    """Write the mean of the models in ``folders`` to ``output``; complete or not there.

    Raises:
        ModelError: no folder, one that cannot be read, models of different shapes, or an output
            that exists.
        OSError: the output cannot be written; nothing half-written remains.
    """
    if not folders:
        raise ModelError("no folder to average")
    if output.exists():
        raise ModelError(f"{output} exists; remove it or choose another --output")
    readers = [HFReader(folder) for folder in folders]
    shape = read_shape(folders[0])
    for folder in folders[1:]:
        if read_shape(folder) != shape:
            raise ModelError(f"{folder} is not of the shape of {folders[0]}: see their config.json")
    writer = ShardWriter(output, folders[0])
    try:
        for row in parameter_table(shape, 1, value_head=False):
            for part in row.tensors:
                first = readers[0].read(part, 0, 1)
                total = first.float()
                for reader in readers[1:]:  # their shapes are checked against the first folder's
                    total = total + reader.read(part, 0, 1).float()
                writer.add(part.name, (total / len(readers)).to(first.dtype))
        writer.finish()
    except BaseException:
        writer.discard()
        raise


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, help="Hugging Face folders")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        average(arguments.folders, arguments.output)
    except (OVRFastError, OSError) as error:
        sys.exit(f"average: {error}")
    print(f"wrote {arguments.output}, the mean of {len(arguments.folders)}")


if __name__ == "__main__":
    main()
