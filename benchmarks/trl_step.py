"""One policy update beside TRL's GRPO trainer: same model, prompts, responses and loss.

    pip install --no-deps trl==1.16.0 accelerate==1.15.0
    python benchmarks/trl_step.py --output benchmarks/results/trl_cpu.json

The training part alone: TRL is handed the recorded responses where it would sample, and both sides
make one optimizer step of the same clipped token-mean loss with group-normalised advantages; ours
with a prompt once in a microbatch too (``rl.share_prefixes``), and with microbatches as large as
TRL's four padded sequences are when all are longest. Where gradient norms differ, the command
fails. Each side runs in a process of its own, in turns; times are ratios within one run.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image

from ovr_fast.torchvision_ops import declare_if_broken

declare_if_broken()

from ovr_fast.data.packing import pack
from ovr_fast.recipe.shards import sequences_of
from ovr_fast.records import Microbatch, Minibatch, RolloutBatch, Targets, to_device
from ovr_fast.rl.losses import PolicyLoss
from ovr_fast.shape.model_shape import read_shape
from workload import (
    DEVICE,
    DTYPE,
    ON_GPU,
    SAME,
    Meter,
    Workload,
    batch_of,
    in_turns,
    make_models,
    model_of_this_machine,
    settings_of,
    write_result,
)

ON_CPU = Workload(
    prompts=2, samples=16, mean_tokens=800.0, max_tokens=2048, image_side=224, prompt_tokens=100,
    together=4, microbatch_tokens=2048 + 100,
)  # fmt: skip
ON_CARD = Workload(
    prompts=4, samples=16, mean_tokens=800.0, max_tokens=2048, image_side=448, prompt_tokens=400,
    together=4, microbatch_tokens=2 * (2048 + 400),
)  # fmt: skip
WORK = ON_CARD if ON_GPU else ON_CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one process measured."""

    grad_norm: float
    seconds: float  # of one update
    peak_gib: float  # see Meter
    kept_gib: float


def advantages_of(batch: RolloutBatch) -> list[float]:
    """GRPO's: rewards of a group less their mean, over their deviation (TRL's 1e-4)."""
    rewards = torch.tensor([r.reward for r in batch.rollouts]).view(-1, WORK.samples)
    mean, deviation = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    return ((rewards - mean) / (deviation + 1e-4)).flatten().tolist()


def ours(
    folder: Path, batch: RolloutBatch, steps: int, *, share: bool = False, work: Workload = WORK
) -> Side:
    models, config = make_models(folder, *settings_of(work), lr=1e-6)
    sequences = sequences_of(batch, models.chat.image_token_id, config.rl)
    advantages = advantages_of(batch)

    def targets(packed: Microbatch) -> Targets:
        each = torch.tensor([advantages[place] for place in packed.sequence_ids])
        per_token = each.repeat_interleave(torch.tensor(packed.responses.lengths))
        return Targets(advantages_R=to_device(per_token, DEVICE))

    def update() -> float:
        models.vision.clear_cache()
        packed = pack(
            sequences,
            positions=models.chat.mrope_cache(),
            max_tokens=config.rl.max_tokens_per_microbatch,
            share_prefixes=share,
        )
        models.vision.encode(packed)
        minibatch = Minibatch(
            microbatches=tuple(packed),
            targets=tuple(map(targets, packed)),
            global_tokens=sum(sequence.response_length for sequence in sequences),
        )
        return models.actor.update(minibatch, PolicyLoss(config.rl, 1.0))["grad_norm"]

    meter, norms = Meter(), []
    for _ in range(1 + steps):
        meter.begin()
        norms.append(update())
        meter.end()
    return Side(grad_norm=norms[0], **meter.found())


def shared(folder: Path, batch: RolloutBatch, steps: int) -> Side:
    return ours(folder, batch, steps, share=True)


def wide(folder: Path, batch: RolloutBatch, steps: int) -> Side:
    longest = WORK.max_tokens + WORK.prompt_tokens
    work = replace(WORK, microbatch_tokens=WORK.together * longest)
    return ours(folder, batch, steps, work=work)


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
        def __init__(self, meter: Meter) -> None:
            self.meter = meter

        def on_step_begin(self, *arguments, **options) -> None:
            self.meter.begin()

        def on_step_end(self, *arguments, **options) -> None:
            self.meter.end()

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=DTYPE).to(DEVICE)
    model.model.visual.requires_grad_(False)
    processor = AutoProcessor.from_pretrained(folder)
    rows = [
        {
            "prompt": [{"role": "user", "content": p.messages[0]["content"][1]["text"]}],
            "images": [Image.open(io.BytesIO(p.images[0].data))],
        }
        for p in prompts
    ]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Recorded(
            model=model,
            reward_funcs=lambda completions, **_: [r.reward for r in rollouts],
            args=GRPOConfig(
                output_dir=scratch,
                use_cpu=not ON_GPU,
                bf16=ON_GPU,
                per_device_train_batch_size=WORK.together,
                gradient_accumulation_steps=len(rollouts) // WORK.together,
                num_generations=WORK.samples,
                max_completion_length=WORK.max_tokens,
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
        )
        meter = Meter()
        trainer.add_callback(Timer(meter))
        trainer.train()
        norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    return Side(grad_norm=float(norms[0]), **meter.found())


SIDES = {"ours": ours, "shared": shared, "wide": wide, "trl": trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--vocab", type=int, default=151_936, help="token ids of a CPU's model")
    parser.add_argument("--steps", type=int, default=2, help="timed updates of a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        batch = batch_of(arguments.model, WORK)
        measured = SIDES[arguments.side](arguments.model, batch, arguments.steps)
        print(json.dumps(asdict(measured)))
        return
    try:
        peer = version("trl")
    except PackageNotFoundError:
        sys.exit(f"TRL is not installed; see the first lines of {__file__}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_of_this_machine(Path(scratch) / "model", vocab=arguments.vocab)
        shape = read_shape(folder)
        about = dict(trl=peer, workload=asdict(WORK) | dict(vocab=shape.vocab, layers=shape.layers))
        measured = in_turns(
            __file__, SIDES, folder, steps=arguments.steps, turns=arguments.turns,
            output=arguments.output, **about,
        )  # fmt: skip
    rows = {side: [Side(**row) for row in measured[side]] for side in SIDES}
    norms = {side: turns[0].grad_norm for side, turns in rows.items()}
    times = {
        side: statistics.median(
            s.seconds / own.seconds for s, own in zip(rows[side], rows["ours"], strict=True)
        )
        for side in SIDES
    }
    peaks = {side: max(s.peak_gib for s in turns) for side, turns in rows.items()}
    memory = {side: peak / peaks["ours"] for side, peak in peaks.items()}
    seconds = {side: statistics.median(s.seconds for s in rows[side]) for side in SIDES}
    kept = {side: turns[0].kept_gib for side, turns in rows.items()}
    title = f"one policy update, {shape.vocab:,} token ids"
    print(f"| {title} | ours | `rl.share_prefixes` | as large as TRL's | TRL {peer} |")
    print("|---" * 5 + "|")
    absolute = [
        ("time, s", seconds, ".2f"),
        ("memory of the update, GiB", peaks, ".2f"),
        ("memory between updates, GiB", kept, ".2f"),
    ]
    for name, values, form in (
        ("time, relative", times, ".2f"),
        ("memory of the update, relative", memory, ".2f"),
        *(absolute if ON_GPU else []),  # a shared CPU gives ratios alone
        ("gradient norm", norms, ".5f"),
    ):
        print(f"| {name} | {' | '.join(format(values[side], form) for side in SIDES)} |")
    if arguments.output:
        write_result(
            arguments.output, finished=True, sides=measured, times=times, memory=memory, **about
        )
    for side, norm in norms.items():
        if abs(norm - norms["trl"]) > SAME * norms["trl"]:
            sys.exit(f"gradient norm {norm} with {side}, {norms['trl']} with TRL: not the same")


if __name__ == "__main__":
    main()
