"""Rollouts from elsewhere than the engine: recorded in a file, or made up for measuring.

A file is a step: Parquet with a row a rollout. The first row of a prompt carries the prompt, with
the bytes of its pictures, so that a file needs nothing beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovr_fast.batch import Picture, Prompt, Rollout
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.prompts import DataError

FAKE_SIGMA = 0.6
"""Of the logarithm of made-up lengths: half of the responses are under 0.84 of the mean, one in a
hundred is over 3.4 times it. No distribution is published for the recipe; ours."""

_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt_index", pa.int64()),
        ("sample_index", pa.int64()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("response_tokens", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("policy_version", pa.int64()),
        ("reward", pa.float64()),
        ("outcome", pa.string()),
        ("prompt", pa.string()),  # JSON; null but on a prompt's first row
        ("pictures", pa.list_(pa.binary())),
    ]
)


def write_rollouts(path: Path, step: int, prompts: list[Prompt], rollouts: list[Rollout]) -> None:
    """Record a step's scored rollouts; the file is there whole or not at all."""
    seen: set[int] = set()
    rows = []
    for rollout in rollouts:
        prompt = prompts[rollout.prompt_index]
        first = rollout.prompt_index not in seen
        seen.add(rollout.prompt_index)
        about = {
            "id": prompt.id,
            "source": prompt.source,
            "messages": prompt.messages,
            "answer": prompt.answer,
            "pictures": [[picture.digest, picture.origin] for picture in prompt.pictures],
        }
        rows.append(
            {
                "step": step,
                "prompt_index": rollout.prompt_index,
                "sample_index": rollout.sample_index,
                "prompt_tokens": rollout.prompt_tokens.astype(np.int32),
                "response_tokens": rollout.response_tokens.astype(np.int32),
                "rollout_logprobs": rollout.rollout_logprobs,
                "text": rollout.text,
                "finish_reason": rollout.finish_reason,
                "policy_version": rollout.policy_version,
                "reward": rollout.reward,
                "outcome": rollout.outcome,
                "prompt": json.dumps(about) if first else None,
                "pictures": [picture.data for picture in prompt.pictures] if first else None,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), partial, compression="zstd")
    partial.rename(path)


def list_recorded(path: Path) -> list[Path]:
    """The file, or a folder's files by name.

    Raises:
        DataError: there is none.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"--rollouts {path}: no recorded rollouts (*.parquet) there")
    return files


def recorded_step(path: Path) -> int:
    """The step that a file is of.

    Raises:
        DataError: the file is not of this kind.
    """
    try:
        return pq.read_table(path, columns=["step"])["step"][0].as_py()
    except (OSError, pa.ArrowException, KeyError, IndexError) as error:
        raise DataError(f"{path}: not a file of recorded rollouts ({error})") from error


def read_rollouts(path: Path) -> tuple[list[Prompt], list[Rollout]]:
    """What ``write_rollouts`` was given.

    Raises:
        DataError: the file is not of this kind.
    """
    try:
        table = pq.read_table(path, schema=_SCHEMA)
        # A step of the recipe has 80 million tokens: they never become Python numbers.
        arrays = {name: _arrays(table[name]) for name in _PER_TOKEN}
        rows = table.drop_columns(list(_PER_TOKEN)).to_pylist()
        prompts: dict[int, Prompt] = {}
        rollouts = []
        for place, row in enumerate(rows):
            index = row["prompt_index"]
            if row["prompt"] is not None:
                about = json.loads(row["prompt"])
                prompts[index] = Prompt(
                    id=about["id"],
                    source=about["source"],
                    messages=tuple(about["messages"]),
                    pictures=tuple(
                        Picture(digest=digest, stored=data, origin=origin)
                        for (digest, origin), data in zip(
                            about["pictures"], row["pictures"], strict=True
                        )
                    ),
                    answer=about["answer"],
                    response=None,
                )
            rollouts.append(
                Rollout(
                    prompt_index=index,
                    sample_index=row["sample_index"],
                    prompt_tokens=arrays["prompt_tokens"][place].astype(np.int64),
                    response_tokens=arrays["response_tokens"][place].astype(np.int64),
                    rollout_logprobs=arrays["rollout_logprobs"][place].astype(np.float32),
                    text=row["text"],
                    finish_reason=row["finish_reason"],
                    policy_version=row["policy_version"],
                    reward=row["reward"],
                    outcome=row["outcome"],
                )
            )
        return [prompts[index] for index in range(len(prompts))], rollouts
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a file of recorded rollouts ({error})") from error


_PER_TOKEN = ("prompt_tokens", "response_tokens", "rollout_logprobs")


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column as arrays."""
    found: list[np.ndarray] = []
    for chunk in column.chunks:
        values = chunk.flatten().to_numpy()
        ends = np.cumsum(chunk.value_lengths().to_numpy())
        found += np.split(values, ends[:-1])
    return found


def fake_rollouts(
    prompts: list[Prompt],
    encoder: ChatEncoder,
    *,
    samples: int,
    mean_tokens: float,
    max_tokens: int,
    vocabulary: int,
    seed: tuple[int, ...],
) -> list[Rollout]:
    """Random responses of log-normal length, for measuring a step without an engine.

    Args:
        mean_tokens: of a response, before those over ``max_tokens`` are cut there.
        vocabulary: token ids under this are drawn, but for picture placeholders.
        seed: everything random follows from it.
    """
    rng = np.random.default_rng(seed)
    middle = np.log(mean_tokens) - FAKE_SIGMA**2 / 2
    rollouts = []
    for index, prompt in enumerate(prompts):
        tokens = encoder.encode(prompt.messages, prompt.pictures, generation_prompt=True)
        for sample in range(samples):
            wanted = max(1, round(rng.lognormal(middle, FAKE_SIGMA)))
            response = rng.integers(0, vocabulary, min(wanted, max_tokens))
            response[response == encoder.image_token_id] = 0
            right = bool(rng.integers(2))
            rollouts.append(
                Rollout(
                    prompt_index=index,
                    sample_index=sample,
                    prompt_tokens=tokens,
                    response_tokens=response,
                    rollout_logprobs=np.zeros(len(response), dtype=np.float32),
                    text="",
                    finish_reason="length" if wanted > max_tokens else "stop",
                    policy_version=0,
                    reward=float(right),
                    outcome="correct" if right else "wrong",
                )
            )
    return rollouts
