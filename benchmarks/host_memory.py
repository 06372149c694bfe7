"""Peak memory that a step's images take on the host.

    python benchmarks/host_memory.py [--prompts 512] [--samples 16]

Makes that many different 1-megapixel images (JPEG), prompts and samples that refer to them, and
does what a training step does with them on the host: packs all samples, with M-RoPE positions, and
makes every image's patches once, as one rank would that had to encode them all.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from ovr_fast.data.images import ImageProcessor, load_image
from ovr_fast.data.packing import pack
from ovr_fast.data.positions import MRopeCache
from ovr_fast.records import Sequence

MODEL = Path(__file__).parent.parent / "ovr_fast" / "toy" / "base_model"
IMAGE = 5


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        settings = json.loads((MODEL / "processor_config.json").read_text())
        part = settings.get("image_processor", settings)
        part["size"] = {"shortest_edge": 3136, "longest_edge": 12_845_056}  # Qwen2.5-VL's own
        (Path(folder) / "processor_config.json").write_text(json.dumps(settings))
        processor = ImageProcessor(folder)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (1000, 1000, 3), dtype=np.uint8)
    start = peak_gib()
    print(f"libraries and one image: {start:.2f} GiB")
    images = []
    for number in range(arguments.prompts):
        buffer = io.BytesIO()
        Image.fromarray(np.roll(base, number, axis=0)).save(buffer, format="JPEG", quality=90)
        images.append(load_image(buffer.getvalue(), origin=f"image {number}"))
    size = sum(len(image.data) for image in images) / 2**30
    print(f"{len(images)} encoded files, {size:.2f} GiB: {peak_gib() - start:.2f} GiB more")
    sequences = []
    for image in images:
        visual = processor.visual_tokens(image)
        prompt = np.concatenate([[10, 11], np.full(visual, IMAGE), [12, 13]])
        for _ in range(arguments.samples):
            tokens = np.concatenate([prompt, rng.integers(20, 100, size=200)])
            sequences.append(
                Sequence.unsampled(
                    tokens, response_start=len(prompt), images=(image,), name=image.origin
                )
            )
    batches = pack(
        sequences,
        positions=MRopeCache(processor, IMAGE),
        max_tokens=32_768,
    )
    tokens = sum(len(s.tokens) for s in sequences)
    print(f"{len(batches)} microbatches of {tokens:,} tokens: {peak_gib() - start:.2f} GiB more")
    patches = sum(len(processor(image)[0]) for image in images)
    print(f"{patches:,} patches made, a bounded number kept: {peak_gib() - start:.2f} GiB more")


if __name__ == "__main__":
    main()
