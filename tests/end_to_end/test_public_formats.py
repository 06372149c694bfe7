"""Files in the shapes of other projects train, each from its own file, by the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from support.processes import run_ranks
from support.row_cases import URL, png
from support.toy_run import BASE_MODEL, ROOT

pytestmark = pytest.mark.slow

COUNT = 8


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


IMAGE = {"bytes": png(), "path": None}
RL: dict[str, list[dict[str, Any]]] = {
    "verl.parquet": [
        {"data_source": "geo3k", "prompt": [user(f"<image>How many at {n}?")], "images": [IMAGE],
         "ability": "math", "reward_model": {"style": "rule", "ground_truth": str(n)},
         "extra_info": {"split": "train", "index": n}}
        for n in range(COUNT)
    ],
    "easyr1.parquet": [
        {"images": [IMAGE], "problem": f"<image>How many at {n}?", "answer": str(n)}
        for n in range(COUNT)
    ],
    "swift.jsonl": [
        {"messages": [user(f"<image>How many at {n}?")], "images": [URL], "solution": str(n)}
        for n in range(COUNT)
    ],
    "gsm8k.jsonl": [
        {"question": f"What is {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(COUNT)
    ],
}  # fmt: skip
COLD: dict[str, list[dict[str, Any]]] = {
    "openr1.parquet": [
        {"problem": f"What is {n}?", "answer": str(n), "solution": rf"\boxed{{{n}}}",
         "messages": [user(f"What is {n}?"), said(rf"It is \boxed{{{n}}}"), user("Sure?"),
                      said("Yes.")]}
        for n in range(COUNT)
    ],
    "sharegpt.json": [
        {"id": str(n), "conversations": [{"from": "human", "value": f"What is {n}?"},
                                         {"from": "gpt", "value": str(n)}]}
        for n in range(COUNT)
    ],
    "trl.jsonl": [
        {"prompt": [user(f"What is {n}?")], "completion": [said(str(n))]} for n in range(COUNT)
    ],
    "alpaca.json": [
        {"instruction": "What is it?", "input": str(n), "output": str(n)} for n in range(COUNT)
    ],
}  # fmt: skip


def write(folder: Path, files: dict[str, list[dict[str, Any]]]) -> str:
    """The files, and a setting with all of them as sources."""
    for name, rows in files.items():
        path = folder / name
        if path.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows, indent=1))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "[" + ", ".join(f'{{path="{folder / name}"}}' for name in files) + "]"


@pytest.mark.parametrize(
    ("stage", "files", "formats"),
    [
        ("rl", RL, ("verl", "easyr1", "messages", "question")),
        ("cold_start", COLD, ("messages", "sharegpt", "trl", "alpaca")),
    ],
)
def test_every_preset_trains(
    tmp_path: Path, stage: str, files: dict, formats: tuple[str, ...]
) -> None:
    sources = write(tmp_path, files)
    words = [
        "-m", "ovr_fast.train", "--config", str(ROOT / "configs" / "tiny.toml"),
        f"run.root={tmp_path}", f'run.stages=["{stage}"]', f"model.path={BASE_MODEL}",
        "evaluation.sources=[]", f"{stage}.sources={sources}", f"{stage}.steps=2",
        "rl.prompts_per_step=8", "rl.samples_per_prompt=2", "rl.max_response_tokens=16",
        "rl.context_tokens=[16]", "rl.context_steps=[]", "cold_start.row_tokens=256",
        "cold_start.rows_per_step=2", *(["--fake-rollouts", "8"] if stage == "rl" else []),
    ]  # fmt: skip
    said = run_ranks(1, words).stdout
    for name, form in zip(files, formats, strict=True):
        assert f"{tmp_path / name}: {COUNT} rows; format {form} (" in said, said
    rows = [json.loads(line) for line in (tmp_path / "tiny/metrics.jsonl").read_text().splitlines()]
    loss = "actor/loss" if stage == "rl" else "cold_start/loss"
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row[loss]) for row in rows)
    if stage == "rl":
        assert rows[0]["vision/tower_passes"] > 0
    again = run_ranks(1, [*words, "run.name=again"]).stdout  # from the store
    wanted = [line for line in said.splitlines() if "rows; format" in line]
    assert [line for line in again.splitlines() if "rows; format" in line] == wanted
