"""What a rehearsal trains: a model of the real shape whose weights take no disk, and prompts."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ovr_fast.config import Config
from ovr_fast.model.hf_weights import parameter_table
from ovr_fast.shape.model_shape import ModelShape, read_shape

TOY = Path(__file__).parents[1] / "toy" / "base_model"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
PUBLISHED_PIXELS = {"shortest_edge": 3136, "longest_edge": 12_845_056}
"""Limits of an image, of the published processor."""
BYTES = 2  # of a weight
SHARD_BYTES = 4 * 2**30
"""Of a file of weights: Linux refuses to map one that is larger than the machine's memory."""


def write_hollow_model(folder: Path, config_json: Path, *, layers: int = 0) -> ModelShape:
    """A Hugging Face folder of the shape in ``config_json``: its weights are holes of a sparse
    file, its tokenizer is the toy's (ids under 640, which no shape of anything depends on).

    Args:
        folder: to be made.
        config_json: of the model.
        layers: of the language model; 0 keeps the shape's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(TOY / name, folder / name)
    processor = json.loads((TOY / "processor_config.json").read_text())
    processor["image_processor"]["size"] = PUBLISHED_PIXELS
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=1))
    toy, config = json.loads((TOY / "config.json").read_text()), json.loads(config_json.read_text())
    for name in (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    ):
        config[name] = toy[name]
    for name in ("bos_token_id", "eos_token_id"):
        config[name] = toy["text_config"][name]
    if layers:
        config["num_hidden_layers"] = layers
        for name in ("layer_types", "max_window_layers"):
            config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shape = read_shape(folder)
    tensors = [t for row in parameter_table(shape, 1, value_head=False) for t in row.tensors]
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for tensor in tensors:
        size = BYTES * math.prod(tensor.shape)
        if held + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            held = 0
        shards[-1][tensor.name] = tensor.shape
        held += size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_hollow_tensors(folder / name, shard)
    files = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return shape


def _write_hollow_tensors(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {}
    end = 0
    for name, shape in tensors.items():
        size = BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_prompts(path: Path, *, count: int, tokens: int) -> None:
    """Prompts of about ``tokens`` tokens, a third of them (at most 1,296) an image of their own.

    They are a few tokens under ``tokens``, for the chat template.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    side = max(2, min(36, math.isqrt(tokens // 3)))
    text = "x" * max(1, tokens - side * side - 48)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        name = f"image_{number}.png"
        tile = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(tile).resize((28 * side, 28 * side)).save(path.with_name(name))
        rows.append({"prompt": text, "images": [name], "answer": "1"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_demonstrations(path: Path, *, count: int, tokens: int) -> None:
    """Cold-start texts of about ``tokens`` tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"prompt": "x" * 16, "response": "x" * max(1, tokens - 64)}
    path.write_text((json.dumps(row) + "\n") * count)


def rehearsal_config(config: Config, *, replicas: int, folder: Path, steps: int) -> Config:
    """The settings of a rehearsal of ``config``: its model, layout, lengths and losses at their
    longest, in ``steps`` steps of as few microbatches as fill the pipeline in every update.

    Args:
        config: the run's.
        replicas: data-parallel size.
        folder: of the rehearsal; the hollow model and the prompts are in it.
        steps: of each stage.
    """
    depth = max(2, config.parallel.pipeline)  # microbatches a replica and update
    rl = config.rl
    updates = rl.minibatches
    fitting = max(
        1, rl.max_tokens_per_microbatch // (rl.max_prompt_tokens + rl.max_response_tokens)
    )
    rollouts = updates * replicas * depth * fitting
    return replace(
        config,
        run=replace(config.run, root=str(folder), record_rollouts=False, export_every=0),
        model=replace(config.model, path=str(folder / "model")),
        rl=replace(
            rl,
            steps=steps,
            prompts_per_step=math.ceil(rollouts / rl.samples_per_prompt),
            context_tokens=(rl.max_response_tokens,),
            context_steps=(),
        ),
        cold_start=replace(config.cold_start, steps=steps, rows_per_step=replicas * depth),
    )
