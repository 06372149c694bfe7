"""One policy update beside TRL's GRPO trainer: same model, prompts, responses and loss, on a CPU.

    pip install --no-deps trl==1.16.0 accelerate==1.15.0
    python benchmarks/trl_step.py --output benchmarks/results/trl_cpu.json

The training part alone: TRL is handed the recorded responses where it would sample, and both sides
make one optimizer step of the same clipped token-mean loss with group-normalised advantages; ours
with a prompt once in a microbatch too (``rl.share_prefixes``). Gradient norms are compared before
times are believed. Each side runs in a process of its own, in turns; times are ratios within one
run, memory is resident memory over that of the loaded process.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image

from ovr_fast.torchvision_ops import declare_if_broken

declare_if_broken()

from ovr_fast.data.packing import pack
from ovr_fast.recipe.shards import sequences_of
from ovr_fast.records import Microbatch, Minibatch, RolloutBatch, Targets
from ovr_fast.rl.losses import PolicyLoss
from ovr_fast.run.folder import environment
from workload import in_a_process, make_batch, make_model, make_models, make_prompts

PROMPTS, SAMPLES, MEAN_TOKENS, MAX_TOKENS, SIDE = 2, 16, 800.0, 2048, 224
TRL_BATCH = 4
"""Sequences that TRL puts through the model together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one process measured."""

    grad_norm: float
    seconds: float  # of one update
    peak_gib: float  # resident, over what was there before the first update


def advantages_of(batch: RolloutBatch) -> list[float]:
    """GRPO's: rewards of a group less their mean, over their deviation (TRL's 1e-4)."""
    rewards = torch.tensor([r.reward for r in batch.rollouts]).view(-1, SAMPLES)
    mean, deviation = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    return ((rewards - mean) / (deviation + 1e-4)).flatten().tolist()


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(folder: Path, batch: RolloutBatch, steps: int, *, share: bool = False) -> Side:
    longest = [f"rl.max_response_tokens={MAX_TOKENS}", "rl.max_prompt_tokens=100"]
    cap = MAX_TOKENS + 100
    models, config = make_models(folder, *longest, f"rl.max_tokens_per_microbatch={cap}", lr=1e-6)
    sequences = sequences_of(batch, models.chat.image_token_id, config.rl)
    advantages = advantages_of(batch)

    def targets(packed: Microbatch) -> Targets:
        each = torch.tensor([advantages[place] for place in packed.sequence_ids])
        per_token = each.repeat_interleave(torch.tensor(packed.responses.lengths))
        return Targets(advantages_R=per_token)

    def update() -> float:
        models.vision.clear_cache()
        packed = pack(
            sequences, positions=models.chat.mrope_cache(), max_tokens=cap, share_prefixes=share
        )
        models.vision.encode(packed)
        minibatch = Minibatch(
            microbatches=tuple(packed),
            targets=tuple(map(targets, packed)),
            global_tokens=sum(sequence.response_length for sequence in sequences),
        )
        return models.actor.update(minibatch, PolicyLoss(config.rl, 1.0))["grad_norm"]

    before, norm, seconds = peak(), update(), []
    for _ in range(steps):
        began = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - began)
    return Side(grad_norm=norm, seconds=statistics.median(seconds), peak_gib=peak() - before)


def shared(folder: Path, batch: RolloutBatch, steps: int) -> Side:
    return ours(folder, batch, steps, share=True)


def trl(folder: Path, batch: RolloutBatch, steps: int) -> Side:
    from datasets import Dataset
    from transformers import (
        AutoProcessor,
        Qwen2_5_VLForConditionalGeneration,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer

    prompts, rollouts = batch.prompts, batch.rollouts

    class Recorded(GRPOTrainer):
        """Takes the recorded responses instead of sampling."""

        def _generate_single_turn(self, prompt_ids, *arguments, **options):
            for index, tokens in enumerate(prompt_ids):
                expected = rollouts[index].prompt_tokens.tolist()
                assert list(tokens) == expected, "TRL sees another prompt"
            return [rollout.response_tokens.tolist() for rollout in rollouts], None

    class Timer(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *arguments, **options) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *arguments, **options) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    processor = AutoProcessor.from_pretrained(folder)
    rows = [
        {
            "prompt": [{"role": "user", "content": p.messages[0]["content"][1]["text"]}],
            "images": [Image.open(io.BytesIO(p.images[0].data))],
        }
        for p in prompts
    ]
    timer = Timer()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Recorded(
            model=model,
            reward_funcs=lambda completions, **_: [r.reward for r in rollouts],
            args=GRPOConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=TRL_BATCH,
                gradient_accumulation_steps=len(rollouts) // TRL_BATCH,
                num_generations=SAMPLES,
                max_completion_length=MAX_TOKENS,
                max_steps=1 + steps,
                learning_rate=1e-6,
                adam_beta2=0.95,
                beta=0.0,
                loss_type="dapo",
                scale_rewards="group",
                gradient_checkpointing=False,
                shuffle_dataset=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
            callbacks=[timer],
        )
        before = peak()
        trainer.train()
        norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    return Side(
        grad_norm=float(norms[0]),
        seconds=statistics.median(timer.seconds[1:]),
        peak_gib=peak() - before,
    )


SIDES = {"ours": ours, "shared": shared, "trl": trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--vocab", type=int, default=151_936, help="token ids of the model")
    parser.add_argument("--steps", type=int, default=2, help="timed updates of a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        prompts = make_prompts(PROMPTS, SIDE)
        batch = make_batch(
            arguments.model,
            prompts,
            samples=SAMPLES,
            mean_tokens=MEAN_TOKENS,
            max_tokens=MAX_TOKENS,
        )
        measured = SIDES[arguments.side](arguments.model, batch, arguments.steps)
        print(json.dumps(asdict(measured)))
        return
    try:
        peer = version("trl")
    except PackageNotFoundError:
        sys.exit(f"TRL is not installed; see the first lines of {__file__}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(Path(scratch) / "model", vocab=arguments.vocab)
        turns = [
            {side: Side(**in_a_process(__file__, side, folder, arguments.steps)) for side in SIDES}
            for _ in range(arguments.turns)
        ]
    rows = {side: [turn[side] for turn in turns] for side in SIDES}
    norms = {side: measured[0].grad_norm for side, measured in rows.items()}
    for side, norm in norms.items():
        if abs(norm - norms["trl"]) > 1e-3 * norms["trl"]:
            sys.exit(f"gradient norm {norm} with {side}, {norms['trl']} with TRL: not the same")
    times = {
        side: statistics.median(turn[side].seconds / turn["ours"].seconds for turn in turns)
        for side in SIDES
    }
    peaks = {side: max(s.peak_gib for s in measured) for side, measured in rows.items()}
    memory = {side: peak / peaks["ours"] for side, peak in peaks.items()}
    title = f"one policy update, {arguments.vocab:,} token ids"
    print(f"| {title} | ours | ours, `rl.share_prefixes` | TRL {peer} |\n|---|---|---|---|")
    for name, values, form in (
        ("time, relative", times, ".2f"),
        ("memory of the update, relative", memory, ".2f"),
        ("gradient norm", norms, ".5f"),
    ):
        print(f"| {name} | {' | '.join(format(values[side], form) for side in SIDES)} |")
    if arguments.output:
        result = {
            "command": " ".join(sys.argv),
            "environment": environment(),
            "trl": peer,
            "workload": dict(
                prompts=PROMPTS, samples=SAMPLES, mean_tokens=MEAN_TOKENS, max_tokens=MAX_TOKENS,
                image_side=SIDE, vocab=arguments.vocab, trl_batch=TRL_BATCH,
            ),
            "sides": {side: [asdict(s) for s in measured] for side, measured in rows.items()},
            "times": times,
            "memory": memory,
        }  # fmt: skip
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
