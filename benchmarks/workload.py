"""What the step benchmarks work on: a random Qwen2.5-VL, prompts with pictures, fixed rollouts."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ovr_fast.batch import Prompt, Rollout
from ovr_fast.config import ModelConfig, OptimizerConfig, load_config
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.rollouts import fake_rollouts
from ovr_fast.data.vision import load_picture
from ovr_fast.learner import Learner, build_stage
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.shape import read_shape
from ovr_fast.observe.clock import Clock
from ovr_fast.parallel.mesh import start_mesh
from ovr_fast.ppo import PPO

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "ovr_fast" / "toy" / "base_model"


def make_model(folder: Path, *, vocab: int) -> Path:
    """A random float32 model of 4 layers with a tower of 4, and the toy tokenizer; token ids past
    the tokenizer's are just never rendered."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    if (folder / "config.json").is_file():
        return folder
    base = json.loads((TOKENIZER / "config.json").read_text())
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocab,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]),
            eos_token_id=base["text_config"]["eos_token_id"],
        ),
        vision_config=dict(
            depth=4,
            hidden_size=128,
            intermediate_size=384,
            num_heads=4,
            out_hidden_size=128,
            window_size=112,
            fullatt_block_indexes=[3],
        ),
        tie_word_embeddings=False,
        **{name: base[name] for name in special},
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json",
                 "chat_template.jinja"):  # fmt: skip
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def make_prompts(count: int, side: int) -> list[Prompt]:
    """A picture of noise, ``side`` pixels square, and a question each."""
    rng = np.random.default_rng(0)
    prompts = []
    for index in range(count):
        file = io.BytesIO()
        pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, format="PNG")
        content = [{"type": "image"}, {"type": "text", "text": "How many red shapes are there?"}]
        prompts.append(
            Prompt(
                id=str(index),
                source="benchmark",
                messages=({"role": "user", "content": content},),
                pictures=(load_picture(file.getvalue(), origin=f"picture {index}"),),
                answer="",
                response=None,
            )
        )
    return prompts


def make_rollouts(
    folder: Path, prompts: list[Prompt], *, samples: int, mean_tokens: float, max_tokens: int
) -> list[Rollout]:
    """Random responses, log-normal in length and cut at ``max_tokens``, with random rewards."""
    encoder = ChatEncoder(folder, image_token_id=read_shape(folder).image_token_id)
    return fake_rollouts(
        prompts,
        encoder,
        samples=samples,
        mean_tokens=mean_tokens,
        max_tokens=max_tokens,
        vocabulary=encoder.image_token_id,
        seed=(0,),
    )


def make_ppo(folder: Path, *settings: str, lr: float) -> PPO:
    """Our training half on this process, without an engine."""
    shape, mesh = read_shape(folder), start_mesh(tensor=1, pipeline=1)
    config = load_config(ROOT / "configs" / "tiny.toml", [f"model.path={folder}", *settings])
    encoder = ChatEncoder(folder, image_token_id=shape.image_token_id)
    model: ModelConfig = config.model
    policy = build_stage(shape, mesh, model, weights=folder)
    pictures = PictureEncoder(
        policy.visual, shape.vision, mesh, encoder.pictures, cache_mib=0
    )  # a step of the recipe has new pictures: none may come from the step before
    valuer = build_stage(shape, mesh, model, weights=folder, value_head=True, tower=policy.visual)
    optimizer = OptimizerConfig(lr=lr)
    return PPO(
        config=config,
        mesh=mesh,
        actor=Learner("actor", policy, pictures, optimizer),
        critic=Learner("critic", valuer, pictures, optimizer),
        reference=None,
        reference_encoder=None,
        engine=None,
        encoder=encoder,
        clock=Clock(),
    )


def in_a_process(script: str, side: str, folder: Path, steps: int) -> dict:
    """What ``script --side SIDE`` prints last, measured in a process of its own."""
    command = [sys.executable, script, "--side", side, "--model", str(folder)]
    done = subprocess.run(
        [*command, "--steps", str(steps)], capture_output=True, text=True, check=False, timeout=7200
    )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
