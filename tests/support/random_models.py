"""Random Qwen2.5-VL folders of several shapes, and conversations with images of odd sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from support.toy_run import BASE_MODEL

SHAPES: dict[str, dict] = {
    # Odd number of layers, tied embeddings, few heads.
    "tied": dict(layers=3, heads=4, kv_heads=2, hidden=64, tied=True, window=56, depth=2, full=[1]),
    # More heads and groups, windows that do not divide most images.
    "wide": dict(
        layers=4, heads=8, kv_heads=4, hidden=128, tied=False, window=84, depth=3, full=[0, 2]
    ),
    # Deep, wide head dimension, windows larger than most images, no full layer but the last.
    "deep": dict(
        layers=5, heads=2, kv_heads=2, hidden=64, tied=False, window=112, depth=4, full=[3]
    ),
}


def make_model(folder: Path, name: str) -> Path:
    """A random float32 model of a shape in ``SHAPES``, with the toy tokenizer and processor."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    shape = SHAPES[name]
    base = json.loads((BASE_MODEL / "config.json").read_text())
    half = shape["hidden"] // shape["heads"] // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=640,
            hidden_size=shape["hidden"],
            intermediate_size=shape["hidden"] * 2 + 32,
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sections),
            eos_token_id=base["text_config"]["eos_token_id"],
        ),
        vision_config=dict(
            depth=shape["depth"],
            hidden_size=64,
            intermediate_size=96,
            num_heads=2,
            out_hidden_size=shape["hidden"],
            window_size=shape["window"],
            fullatt_block_indexes=shape["full"],
        ),
        image_token_id=base["image_token_id"],
        video_token_id=base["video_token_id"],
        vision_start_token_id=base["vision_start_token_id"],
        vision_end_token_id=base["vision_end_token_id"],
        tie_word_embeddings=shape["tied"],
    )
    torch.manual_seed(sum(map(ord, name)))
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # so that biases and norms are no ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json",
                 "chat_template.jinja"):  # fmt: skip
        shutil.copyfile(BASE_MODEL / file, folder / file)
    return folder


def make_conversations(folder: Path, count: int = 7) -> Path:
    """Text only, one image, several images of odd sizes and shapes; returns the JSONL file."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    sizes = [[], [(57, 131)], [(30, 30), (200, 41)], [(28, 28)], [(90, 61), (61, 90), (33, 190)]]
    for i in range(count):
        content: list[dict] = []
        for j, (height, width) in enumerate(sizes[i % len(sizes)]):
            name = f"{i}-{j}.png"
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            content.append({"type": "image", "image": name})
            content.append({"type": "text", "text": " then" * j})
        content.append({"type": "text", "text": "How many red shapes are there? " * (i % 3 + 1)})
        messages = [
            {"role": "user", "content": content if i % 2 or len(content) > 1 else "What is this?"},
            {"role": "assistant", "content": "I see: top r - b . \\boxed{3}" + " and" * i},
        ]
        rows.append({"messages": messages})
    path = folder / "conversations.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def transformers_logprobs(
    model_folder: Path, conversations: Path
) -> list[tuple[list, torch.Tensor]]:
    """Token ids and log-probs of each conversation by transformers, one at a time, float32."""
    with torch.no_grad():
        return list(_logprobs(_load(model_folder), model_folder, conversations))


def transformers_gradients(model_folder: Path, conversations: Path) -> dict[str, torch.Tensor]:
    """Gradients of the mean cross-entropy over all tokens but each first, by the names on disk."""
    model = _load(model_folder)
    scored = [logprobs for _, logprobs in _logprobs(model, model_folder, conversations)]
    (-torch.cat(scored).mean()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    saved = model_folder / "gradients"  # saving translates the names
    model.save_pretrained(saved)
    return load_file(saved / "model.safetensors")


def _load(model_folder: Path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)


def _logprobs(
    model, model_folder: Path, conversations: Path
) -> Iterator[tuple[list, torch.Tensor]]:
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    template = (model_folder / "chat_template.jinja").read_text()
    processor = AutoImageProcessor.from_pretrained(model_folder)
    for line in conversations.read_text().splitlines():
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
        images = [
            Image.open(conversations.parent / part["image"])
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]
        vision: dict = {}
        if images:
            vision = dict(processor(images=images, return_tensors="pt"))
            pieces = text.split("<|image_pad|>")
            text = pieces[0]
            for grid, piece in zip(vision["image_grid_thw"], pieces[1:], strict=True):
                text += "<|image_pad|>" * (int(grid.prod()) // 4) + piece
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            **vision,
        ).logits
        yield ids[0].tolist(), logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
