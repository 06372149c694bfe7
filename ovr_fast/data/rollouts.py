"""Rollouts from elsewhere than vLLM: recorded in a file, or random ones to measure with.

A file is a step: Parquet with a row a rollout. The first row of a prompt carries the prompt, with
the bytes of its images, so that a file needs nothing beside it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError
from ovr_fast.records import ImageFile, Prompt, Rollout, RolloutBatch, VersionSpan

LENGTH_SIGMA = 0.6
"""Deviation of the logarithm of synthetic lengths: half of the responses are under 0.84 of the
mean, one in a hundred is over 3.4 times it. No distribution is published for the recipe; ours."""

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
        ("versions", pa.list_(pa.list_(pa.int64()))),  # (version, its first token) each
        ("reward", pa.float64()),
        ("outcome", pa.string()),
        ("scores", pa.string()),  # JSON: what a reward function named beside its reward
        ("prompt", pa.string()),  # JSON; null but on a prompt's first row
        ("images", pa.list_(pa.binary())),
    ]
)


def write_rollouts(path: Path, batch: RolloutBatch) -> None:
    """Record a step's rollouts; the file is there whole or not at all."""
    seen: set[int] = set()
    rows = []
    for rollout in batch.rollouts:
        prompt = batch.prompt_of(rollout)
        first = rollout.prompt_index not in seen
        seen.add(rollout.prompt_index)
        about = {
            "id": prompt.id,
            "data_source": prompt.data_source,
            "messages": prompt.messages,
            "answer": prompt.answer,
            "columns": prompt.columns,
            "images": [[image.digest, image.origin] for image in prompt.images],
        }
        rows.append(
            {
                "step": batch.step,
                "prompt_index": rollout.prompt_index,
                "sample_index": rollout.sample_index,
                "prompt_tokens": rollout.prompt_tokens.astype(np.int32),
                "response_tokens": rollout.response_tokens.astype(np.int32),
                "rollout_logprobs": rollout.rollout_logprobs,
                "text": rollout.text,
                "finish_reason": rollout.finish_reason,
                "versions": [list(span) for span in rollout.versions],
                "reward": rollout.reward,
                "outcome": rollout.outcome,
                "scores": json.dumps(dict(rollout.scores)),
                "prompt": json.dumps(about) if first else None,
                "images": [image.data for image in prompt.images] if first else None,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), partial, compression="zstd")
    partial.rename(path)


def list_recorded(path: Path) -> list[Path]:
    """The recorded file, or a folder's files by name.

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


def read_rollouts(path: Path, *, vocabulary: int | None = None) -> RolloutBatch:
    """What ``write_rollouts`` was given.

    Args:
        vocabulary: token ids are under this; None: not checked.

    Raises:
        DataError: the file is not of this kind, or a row of it cannot be trained on: an empty
            response, log-probs of another number, no finite reward, unknown token ids.
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
            tokens = [arrays[name][place] for name in _PER_TOKEN]
            if problem := _untrainable(row["reward"], tokens, vocabulary):
                raise DataError(f"{path}:row {place + 1}: {problem}")
            if row["prompt"] is not None:
                about = json.loads(row["prompt"])
                prompts[index] = Prompt(
                    id=about["id"],
                    data_source=about["data_source"],
                    messages=tuple(about["messages"]),
                    images=tuple(
                        ImageFile(digest=digest, stored=data, origin=origin)
                        for (digest, origin), data in zip(
                            about["images"], row["images"], strict=True
                        )
                    ),
                    answer=about["answer"],
                    response=None,
                    columns=about.get("columns", {}),
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
                    versions=tuple(VersionSpan(*span) for span in row["versions"]),
                    reward=row["reward"],
                    outcome=row["outcome"],
                    scores=tuple(json.loads(row["scores"] or "{}").items()),
                )
            )
        return RolloutBatch(
            step=rows[0]["step"],
            prompts=tuple(prompts[index] for index in range(len(prompts))),
            rollouts=tuple(rollouts),
        )
    except (OSError, pa.ArrowException, KeyError, IndexError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a file of recorded rollouts ({error})") from error


_PER_TOKEN = ("prompt_tokens", "response_tokens", "rollout_logprobs")


def _untrainable(reward: float | None, per_token: list[np.ndarray], vocabulary: int | None) -> str:
    """Why a recorded rollout cannot be trained on; "" where it can."""
    prompt, response, logprobs = per_token
    if not len(prompt) or not len(response):
        return f"an empty {'prompt' if not len(prompt) else 'response'}; remove the row"
    if len(logprobs) != len(response):
        return f"{len(logprobs)} log-probs for {len(response)} response tokens"
    if reward is None or not math.isfinite(reward):
        return f"its reward is {reward}"
    if np.isnan(logprobs).any():
        return "a log-prob is not a number"
    for name, tokens in (("prompt", prompt), ("response", response)):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            return f"token id {low if low < 0 else high} of the {name} is not in the vocabulary"
    return ""


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column as arrays."""
    found: list[np.ndarray] = []
    for chunk in column.chunks:
        if chunk.null_count or chunk.flatten().null_count:
            raise ValueError("a list of tokens or log-probs is null, or holds a null")
        values = chunk.flatten().to_numpy()
        ends = np.cumsum(chunk.value_lengths().to_numpy())
        found += np.split(values, ends[:-1])
    return found


def synthetic_rollouts(
    prompts: tuple[Prompt, ...],
    chat: ChatTemplate,
    *,
    samples: int,
    mean_tokens: float,
    max_tokens: int,
    vocabulary: int,
    seed: tuple[int, ...],
) -> list[Rollout]:
    """Random responses of log-normal length, for measuring a step without servers.

    Args:
        prompts: of the step.
        chat: the model's chat template.
        samples: responses to each prompt.
        mean_tokens: of a response, before those over ``max_tokens`` are cut there.
        max_tokens: a response is truncated here.
        vocabulary: token ids under this are drawn, but for image placeholders.
        seed: everything random follows from it.
    """
    rng = np.random.default_rng(seed)
    middle = np.log(mean_tokens) - LENGTH_SIGMA**2 / 2
    rollouts = []
    for index, prompt in enumerate(prompts):
        tokens = chat.encode(prompt.messages, prompt.images, generation_prompt=True)
        for sample in range(samples):
            wanted = max(1, round(rng.lognormal(middle, LENGTH_SIGMA)))
            response = rng.integers(0, vocabulary, min(wanted, max_tokens))
            response[response == chat.image_token_id] = 0
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
                    versions=(VersionSpan(version=0, start=0),),
                    reward=float(right),
                    outcome="correct" if right else "wrong",
                )
            )
    return rollouts
