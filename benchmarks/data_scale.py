"""Seconds and memory of reading data at the recipe's size: first start, second start, a step.

    python benchmarks/data_scale.py --images 50000 --texts 1000000 --folder DIR --output FILE.json

Makes rows whose 1-megapixel JPEGs all differ (4 GB for 50,000) and texts of a few hundred tokens,
then reads them as training does, and a sample of them as it did before there was a store: all in
the memory of each rank.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ovr_fast.config import DataSource
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.index import Job, ensure_store, measure_of
from ovr_fast.data.prompts import Mixture, read
from ovr_fast.data.rows import render
from ovr_fast.data.store import StoredPrompts
from ovr_fast.shape.model_shape import read_shape

MODEL = Path(__file__).parents[1] / "ovr_fast" / "toy" / "base_model"
SAMPLE = 2000
STEP_PROMPTS = 512
"""Of a step of the recipe (OVR, appendix B)."""
WORDS = tuple(f"word{number}" for number in range(24))


def write_images(folder: Path, count: int) -> Path:
    """Prompts with a JPEG each: one picture, told apart by a comment."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((1024, 1024)).save(buffer, format="JPEG", quality=85)
    data = buffer.getvalue()
    with open(folder / "images.jsonl", "w") as file:
        for number in range(count):
            comment = f"{number:012d}".encode()
            marked = data[:2] + b"\xff\xfe\x00\x0e" + comment + data[2:]
            (pictures / f"{number}.jpg").write_bytes(marked)
            row = {"prompt": f"How many at {number}?", "images": [f"pictures/{number}.jpg"]}
            file.write(json.dumps(row | {"answer": str(number % 10)}) + "\n")
    return folder / "images.jsonl"


def write_texts(folder: Path, count: int) -> Path:
    """Demonstrations of some 200 words."""
    rng = np.random.default_rng(0)
    with open(folder / "texts.jsonl", "w") as file:
        for number in range(count):
            words = [WORDS[i] for i in rng.integers(0, len(WORDS), 200)]
            file.write(json.dumps({"prompt": f"Say {number}.", "response": " ".join(words)}) + "\n")
    return folder / "texts.jsonl"


def memory_mib() -> float:
    """The most that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def of_a_rank(way: str, job: Job, cache: Path) -> dict[str, float]:
    """One rank's seconds and memory, in a process of its own."""
    chat = ChatTemplate(job.model, image_token_id=job.image_token_id)
    before, began = memory_mib(), time.perf_counter()
    found: dict[str, float] = {}
    if way == "in memory":
        prompts, _, _ = read(job.source, need=job.need, measure=measure_of(job, chat), limit=SAMPLE)
        found["rows"] = len(prompts)
    else:
        folder = ensure_store(job, chat, cache, workers=0)
        found["start_s"] = time.perf_counter() - began
        pool = StoredPrompts(folder)
        found["rows"] = len(pool)
        stream, began = Mixture([pool], [1.0], seed=0), time.perf_counter()
        for prompt in stream.take(STEP_PROMPTS):
            if job.need == "response":
                render(prompt, chat)
            for image in prompt.images:
                assert image.data
        found[f"{STEP_PROMPTS}_prompts_s"] = time.perf_counter() - began
    found.setdefault("start_s", time.perf_counter() - began)
    return found | {"memory_mib": memory_mib() - before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, required=True, help="is made, and removed")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, token = arguments.folder, read_shape(MODEL).image_token_id
    if arguments.rank:
        way, name, need = arguments.rank
        job = Job(DataSource(path=str(folder / name)), need, "all", str(MODEL), token)
        print(json.dumps(of_a_rank(way, job, folder / "cache")))
        return
    folder.mkdir(parents=True)
    result: dict = {"cores": len(os.sched_getaffinity(0))}
    try:
        files = {
            "images": (write_images(folder, arguments.images), "answer"),
            "texts": (write_texts(folder, arguments.texts), "response"),
        }
        for name, (path, need) in files.items():
            for way in ("in memory", "first start", "second start"):
                command = [sys.executable, __file__, "--folder", str(folder), "--rank", way,
                           path.name, need]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                result[f"{name}, {way}"] = json.loads(done.stdout.splitlines()[-1])
                print(f"{name}, {way}: {result[f'{name}, {way}']}", flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
