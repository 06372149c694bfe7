"""What the step benchmarks work on, and how they measure it: a random Qwen2.5-VL, prompts with
images, fixed rollouts; a small one in float32 on a CPU, one as wide as 3B in bfloat16 on a GPU."""

from __future__ import annotations

import io
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ovr_fast.config import Config, OptimizerConfig, load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.images import load_image
from ovr_fast.data.rollouts import synthetic_rollouts
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.parallel.mesh import start_mesh
from ovr_fast.recipe.build import Models, build_ppo
from ovr_fast.records import Prompt, RolloutBatch
from ovr_fast.run.folder import environment
from ovr_fast.shape.cost import tower_flops
from ovr_fast.shape.folder import PUBLISHED
from ovr_fast.shape.model_shape import read_shape

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "ovr_fast" / "toy" / "base_model"
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SAME = 1e-2 if ON_GPU else 1e-3
"""Relative difference of gradient norms within which two sides made the same update: weights,
activations and the peers' gradients have 8 bits on a GPU."""
GPU_LAYERS = 12
"""Of a model as wide as 3B: with a peer's whole logits beside it, it fits a card of 80 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts, and the responses to them."""

    prompts: int
    samples: int  # of a prompt
    mean_tokens: float  # of a response, before the cut
    max_tokens: int
    image_side: int  # pixels, of a prompt's one square image
    prompt_tokens: int  # no prompt has more
    together: int  # sequences that a peer puts through the model in one forward
    microbatch_tokens: int  # of ours


class Meter:
    """Seconds and memory of steps, of which the first is a warm-up.

    On a GPU memory is the allocator's peak over what stays between steps (weights, optimizer,
    gradients where they are kept); on a CPU it is resident memory over that of the loaded process,
    with all that the first step made.
    """

    def __init__(self) -> None:
        self._before, self._seconds = _memory_gib(), list[float]()

    def begin(self) -> None:
        """A step begins."""
        _wait()
        self._began = time.perf_counter()

    def end(self) -> None:
        """It is done."""
        _wait()
        self._seconds.append(time.perf_counter() - self._began)
        if ON_GPU and len(self._seconds) == 1:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**30

    def found(self) -> dict[str, float]:
        """``seconds`` of a step (median), ``peak_gib``, and ``kept_gib`` between steps (0 on a
        CPU, which cannot tell)."""
        return {
            "seconds": statistics.median(self._seconds[1:]),
            "peak_gib": _memory_gib() - self._before,
            "kept_gib": self._before if ON_GPU else 0.0,
        }


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _memory_gib() -> float:
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def model_of_this_machine(folder: Path, *, vocab: int) -> Path:
    """What the step benchmarks train.

    Args:
        folder: to be made.
        vocab: token ids of the small model; a GPU's has its published 151,936.
    """
    if not ON_GPU:
        return make_model(folder, vocab=vocab)
    command = [sys.executable, ROOT / "benchmarks" / "gpu_run.py", "--write", folder]
    subprocess.run([*map(str, command), str(GPU_LAYERS)], check=True)
    return folder


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
    """An image of noise, ``side`` pixels square, and a question each."""
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
                data_source="benchmark",
                messages=({"role": "user", "content": content},),
                images=(load_image(file.getvalue(), origin=f"image {index}"),),
                answer="",
                response=None,
            )
        )
    return prompts


def batch_of(folder: Path, work: Workload) -> RolloutBatch:
    """A workload's."""
    return make_batch(
        folder,
        make_prompts(work.prompts, work.image_side),
        samples=work.samples,
        mean_tokens=work.mean_tokens,
        max_tokens=work.max_tokens,
    )


def settings_of(work: Workload) -> tuple[str, ...]:
    """The trainer's, for a workload; no side recomputes activations."""
    return (
        f"rl.max_prompt_tokens={work.prompt_tokens}",
        f"rl.max_response_tokens={work.max_tokens}",
        f"rl.max_tokens_per_microbatch={work.microbatch_tokens}",
        f"model.dtype={str(DTYPE).removeprefix('torch.')}",
        "model.recompute=none",
    )


def make_batch(
    folder: Path, prompts: list[Prompt], *, samples: int, mean_tokens: float, max_tokens: int
) -> RolloutBatch:
    """Random responses, log-normal in length and cut at ``max_tokens``, with random rewards."""
    chat = ChatTemplate(folder, image_token_id=read_shape(folder).image_token_id)
    rollouts = synthetic_rollouts(
        tuple(prompts),
        chat,
        samples=samples,
        mean_tokens=mean_tokens,
        max_tokens=max_tokens,
        vocabulary=chat.image_token_id,
        seed=(0,),
    )
    return RolloutBatch(step=1, prompts=tuple(prompts), rollouts=tuple(rollouts))


def make_models(
    folder: Path, *settings: str, lr: float, make_encoder: type = VisionEncoder
) -> tuple[Models, Config]:
    """Actor and critic on this process, wired as the trainer wires them, and their settings. No
    visual tokens are kept between steps: a step of the recipe has new images."""
    more = [f"model.path={folder}", "model.vision_cache_mib=0", *settings]
    config = load_config(ROOT / "configs" / "tiny.toml", more)
    optimizer = OptimizerConfig(lr=lr)
    rl = replace(config.rl, actor=optimizer, critic=optimizer, decay="constant")
    config = replace(config, rl=rl)
    shape, mesh = read_shape(folder), start_mesh(tensor=1, pipeline=1)
    chat = ChatTemplate(folder, image_token_id=shape.image_token_id)
    models = build_ppo(config, shape, mesh, chat, weights=folder, make_encoder=make_encoder)
    return models, config


def realistic_costs(count: int = 512) -> list[float]:
    """Estimated FLOPs of images of 0.1 to 2 megapixels and aspects to 7:1, on the 7B tower."""
    shape = read_shape(PUBLISHED / "Qwen2.5-VL-7B-Instruct").vision
    rng = np.random.default_rng(0)
    areas = np.exp(rng.uniform(np.log(0.1e6), np.log(2e6), count))
    aspects = np.exp(rng.uniform(-2, 2, count))
    heights, widths = np.sqrt(areas * aspects) // 28 * 2, np.sqrt(areas / aspects) // 28 * 2
    return [tower_flops((1, int(h), int(w)), shape) for h, w in zip(heights, widths, strict=True)]


def in_turns(
    script: str,
    sides: Iterable[str],
    folder: Path,
    *,
    steps: int,
    turns: int,
    output: Path | None,
    **about: object,
) -> dict[str, list[dict]]:
    """What ``script --side SIDE`` prints last, of each side in turns, in processes of their own.

    Args:
        folder: the model.
        output: gets all that has been measured and ``about`` after each, so that a command that is
            cut off leaves what it had (``finished`` is false then).
    """
    rows: dict[str, list[dict]] = {}
    for side in [*sides] * turns:
        rows.setdefault(side, []).append(_in_a_process(script, side, folder, steps))
        if output:
            write_result(output, finished=False, sides=rows, **about)
    return rows


@cache
def _environment() -> dict:
    """At the first result: a result that is written changes a file of the repository."""
    return environment()


def write_result(output: Path, **found: object) -> None:
    """As JSON, with the command and where it ran."""
    device = torch.cuda.get_device_name() if ON_GPU else platform.processor()
    where = {"command": " ".join(sys.argv), "environment": _environment(), "device": device}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(where | found, indent=1) + "\n")


def _in_a_process(script: str, side: str, folder: Path, steps: int) -> dict:
    command = [sys.executable, script, "--side", side, "--model", str(folder)]
    done = subprocess.run(
        [*command, "--steps", str(steps)], capture_output=True, text=True, check=False, timeout=7200
    )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    last = done.stdout.splitlines()[-1]
    print(f"{side}: {last}", file=sys.stderr, flush=True)  # kept also where another side fails
    return json.loads(last)
