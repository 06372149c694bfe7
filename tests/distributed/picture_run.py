"""PPO steps on made-up rollouts about pictures, for tests and benchmarks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from conftest import ROOT
from ovr_fast.batch import Picture, Prompt, Rollout
from ovr_fast.config import OptimizerConfig, load_config
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.vision import load_picture
from ovr_fast.learner import Learner, build_stage
from ovr_fast.model.cost import tower_flops
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.shape import read_shape
from ovr_fast.observe.clock import Clock
from ovr_fast.parallel.mesh import start_mesh
from ovr_fast.ppo import PPO

SAMPLES = 16


def a_picture(seed: int, size: tuple[int, int] = (90, 61)) -> Picture:
    """Noise of a height and width."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return load_picture(buffer.getvalue(), origin=f"picture {seed}")


def picture_ppo(folder: Path, train_vision: str, kind: type = PictureEncoder) -> PPO:
    """Actor, critic and no engine, wired as the trainer wires them."""
    shape, mesh = read_shape(folder), start_mesh(tensor=1, pipeline=1)
    settings = [
        f"model.path={folder}",
        f"model.train_vision={train_vision}",
        "rl.max_tokens_per_microbatch=4096",
    ]
    config = load_config(ROOT / "configs" / "tiny.toml", settings)
    chat = ChatEncoder(folder, image_token_id=shape.image_token_id)
    policy = build_stage(shape, mesh, config.model, weights=folder)
    encoder = kind(policy.visual, shape.vision, mesh, chat.pictures)
    tower = None if encoder.trained else policy.visual
    valuer = build_stage(shape, mesh, config.model, weights=folder, value_head=True, tower=tower)
    valuer_encoder = encoder
    if encoder.trained:
        valuer_encoder = kind(valuer.visual, shape.vision, mesh, chat.pictures)
    optimizer = OptimizerConfig(lr=1e-4)
    return PPO(
        config=config,
        mesh=mesh,
        actor=Learner("actor", policy, encoder, optimizer),
        critic=Learner("critic", valuer, valuer_encoder, optimizer),
        reference=None,
        reference_encoder=None,
        engine=None,
        encoder=chat,
        clock=Clock(),
    )


def picture_rollouts(
    ppo: PPO, count: int = 4, size: tuple[int, int] = (90, 61)
) -> tuple[list[Prompt], list[Rollout]]:
    """``SAMPLES`` responses to each of ``count`` prompts; all but the last have a picture."""
    rng = np.random.default_rng(0)
    prompts, rollouts = [], []
    for index in range(count):
        pictures = (a_picture(index, size),) if index < count - 1 else ()
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": "how many red?"}]
        messages = ({"role": "user", "content": content},)
        prompts.append(
            Prompt(id=f"prompt {index}", source="test", messages=messages, pictures=pictures,
                   answer="1", response=None)
        )  # fmt: skip
        tokens = ppo.encoder.encode(messages, pictures, generation_prompt=True)
        for sample in range(SAMPLES):
            response = rng.integers(5, 100, size=int(rng.integers(2, 9)))
            rollouts.append(
                Rollout(
                    prompt_index=index,
                    sample_index=sample,
                    prompt_tokens=tokens,
                    response_tokens=response,
                    rollout_logprobs=np.zeros(len(response), dtype=np.float32),
                    text="",
                    finish_reason="stop",
                    policy_version=0,
                    reward=float(sample % 2),
                    outcome="correct" if sample % 2 else "wrong",
                )
            )
    return prompts, rollouts


def realistic_costs(count: int = 512) -> list[float]:
    """Predicted costs of pictures of 0.1 to 2 megapixels and aspects to 7:1, on the 7B tower."""
    folder = ROOT / "ovr_fast" / "model" / "published" / "Qwen2.5-VL-7B-Instruct"
    shape, rng = read_shape(folder).vision, np.random.default_rng(0)
    areas = np.exp(rng.uniform(np.log(0.1e6), np.log(2e6), count))
    aspects = np.exp(rng.uniform(-2, 2, count))
    heights, widths = np.sqrt(areas * aspects) // 28 * 2, np.sqrt(areas / aspects) // 28 * 2
    return [tower_flops((1, int(h), int(w)), shape) for h, w in zip(heights, widths, strict=True)]
