"""A few steps of both stages on the toy data, as ``make train`` would run them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ovr_fast.toy.data import write_toy_data

ROOT = Path(__file__).parents[2]
BASE_MODEL = ROOT / "ovr_fast" / "toy" / "base_model"


def write_data(folder: Path) -> None:
    """The toy data of the short runs, and prompts whose images readers tend to see differently, for
    the log-prob gap to show it."""
    write_toy_data(folder, cold_start=200, rl=60, held_out=20)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (131, 57, 4), dtype=np.uint8), mode="RGBA")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise.save(folder / "transparent.png")
    noise.convert("RGB").save(folder / "odd.png")
    noise.convert("RGB").save(folder / "turned.jpg", exif=exif)
    names = ("transparent.png", "odd.png", "turned.jpg")
    rows = [{"prompt": "How many red shapes?", "images": [n], "answer": "1"} for n in names]
    (folder / "rl_odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(workplace: Path, name: str, *more: str) -> list[str]:
    """Of ``python``, for a run called ``name`` in ``workplace``, whose ``toy_data`` is written."""
    data = workplace / "toy_data"
    toml = (ROOT / "configs" / "tiny.toml").read_text().replace("runs/toy_data", str(data))
    toml = toml.replace("ovr_fast/toy/base_model", str(BASE_MODEL))
    toml += f'\n[[rl.sources]]\npath = "{data / "rl_odd.jsonl"}"\nweight = 2.0\n'
    config = workplace / f"{name}.toml"
    config.write_text(toml)
    return [
        "-m", "ovr_fast.train", "--config", str(config),
        f"run.name={name}", f"run.root={workplace}", "run.save_every=2",
        "cold_start.steps=3", "cold_start.rows_per_step=1", "cold_start.row_tokens=1024",
        "rl.steps=4", "rl.prompts_per_step=4", "rl.samples_per_prompt=4",
        "rl.max_response_tokens=40", "rl.context_tokens=[12, 40]", "rl.context_steps=[2]",
        "evaluation.prompts=10", "evaluation.every=0", "rollout.compile=false", *more,
    ]  # fmt: skip


def both_stages(workplace: Path) -> list[str]:
    """The run whose metrics are ``tests/golden/toy.jsonl``, on one process."""
    return arguments(workplace, "whole", "run.record_rollouts=true")


def two_ranks(workplace: Path) -> list[str]:
    """The run whose metrics are ``tests/golden/two_ranks.jsonl``: RL on the rollouts that
    ``both_stages`` recorded, on two data-parallel ranks."""
    whole = workplace / "whole"
    more = [f"model.path={whole / 'cold_start_hf'}", "--only", "train"]
    return arguments(workplace, "two_ranks", *more, "--rollouts", str(whole / "rollouts"))
