"""One PPO update beside the same one as it is usually written first (``naive.py``).

    python benchmarks/step.py --output benchmarks/results/step_cpu.json

Same model, prompts, rollouts and loss; where the actor's gradient norm or the critic's loss
differs, the command fails. Each side runs in a process of its own, in turns; ours with prompts that
stand once in a microbatch too (``rl.share_prefixes``). Lengths are a fortieth
of the recipe's: log-normal with a mean of 250, cut at 614 (10 thousand and 24,576); on a GPU they
have a mean of 800 and are cut at 2,048. Times are ratios within one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ovr_fast.torchvision_ops import declare_if_broken

declare_if_broken()

from naive import NaivePPO
from ovr_fast.data.balance import load_imbalance, split_minibatches
from ovr_fast.plan.flops import ppo_passes, rollout_flops
from ovr_fast.recipe.alone import learn
from ovr_fast.records import RolloutBatch
from ovr_fast.shape.cost import Passes, sequence_flops, tower_flops
from ovr_fast.shape.model_shape import read_shape
from workload import (
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
    prompts=12, samples=8, mean_tokens=250.0, max_tokens=614, image_side=224, prompt_tokens=100,
    together=8, microbatch_tokens=8 * (614 + 100),
)  # fmt: skip
ON_CARD = Workload(
    prompts=4, samples=16, mean_tokens=800.0, max_tokens=2048, image_side=448, prompt_tokens=400,
    together=2, microbatch_tokens=2 * (2048 + 400),
)  # fmt: skip
WORK = ON_CARD if ON_GPU else ON_CPU
"""Our microbatches hold what the naive one holds when all of its sequences are longest."""
CRITIC_STEPS, RANKS = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one process measured."""

    grad_norm: float
    critic_loss: float
    seconds: float  # of one step
    peak_gib: float  # see Meter
    kept_gib: float
    tflop: float  # counted, of one step
    forward_units: float
    tower_passes: int
    padding: float  # share of the processed tokens that are padding
    imbalance: float  # largest load of 8 data-parallel ranks over the mean, minus 1
    shared: float  # share of all tokens that are a prompt's again, and left out


def measure(side: str, folder: Path, steps: int) -> Side:
    """Warm up once, then time ``steps``."""
    step, count = SIDES[side](folder, batch_of(folder, WORK))
    meter, rows = Meter(), []
    for _ in range(1 + steps):
        meter.begin()
        rows.append(step())
        meter.end()
    return Side(
        grad_norm=rows[0]["actor/grad_norm"],
        critic_loss=rows[0]["critic/loss"],
        **meter.found(),
        **count(rows[0]),
    )


Metrics = dict[str, float]
Counted = tuple[Callable[[], Metrics], Callable[[Metrics], dict]]
"""A step, and from its first metrics to what was counted."""


def ours(folder: Path, batch: RolloutBatch, *words: str) -> Counted:
    """The trainer's step, with more settings."""
    steps = f"rl.critic_steps={CRITIC_STEPS}"
    models, config = make_models(folder, *settings_of(WORK), steps, *words, lr=1e-6)

    def step() -> Metrics:
        models.vision.clear_cache()  # a step of the recipe has new images
        return learn(models, config, batch)

    def count(first: Metrics) -> dict:
        shape, processor = models.actor.model.shape, models.chat.image_processor
        costs = rollout_flops(batch, shape, processor, ppo_passes(config.rl), tower_trained=False)
        minibatches = split_minibatches(
            costs,
            list(range(len(costs))),
            affinity=[r.prompt_index for r in batch.rollouts],
            count=1,
            ranks=RANKS,
            seed=(0, 0),
        )
        return dict(
            tflop=first["perf/train_tflop"],
            forward_units=first["perf/forward_passes"],
            tower_passes=int(first["vision/tower_passes"]),
            padding=0.0,
            imbalance=max(load_imbalance(shares, costs) for shares in minibatches),
            shared=first.get("pack/shared_share", 0.0),
        )

    return step, count


def shared(folder: Path, batch: RolloutBatch) -> Counted:
    """The trainer's step, with a prompt once in a microbatch."""
    return ours(folder, batch, "rl.share_prefixes=true")


def naive(folder: Path, batch: RolloutBatch) -> Counted:
    """The same step as it is usually written first."""
    shape, rollouts = read_shape(folder), batch.rollouts
    plain = NaivePPO(folder, microbatch=WORK.together, critic_steps=CRITIC_STEPS, lr=1e-6)

    def count(first: Metrics) -> dict:
        passes = Passes(decoder=9, head=5)
        chunks = plain.padded_tokens(list(rollouts))
        grid = plain.processor.grid(batch.prompts[0].images[0])
        whole = sum(n * sequence_flops(shape, size, size, passes) for n, size in chunks)
        # The tower is frozen: it has no backward, but it runs in each of the five forwards.
        towers = 5 * len(rollouts) * tower_flops(grid, shape.vision)
        order = np.random.default_rng(0).permutation(len(rollouts))
        lengths = [len(r.prompt_tokens) + len(r.response_tokens) for r in rollouts]
        each = [
            sequence_flops(shape, lengths[i], len(rollouts[i].response_tokens), passes)
            for i in order
        ]
        share = len(each) // RANKS
        slices = [list(range(rank * share, (rank + 1) * share)) for rank in range(RANKS)]
        return dict(
            tflop=(whole + towers) / 1e12,
            forward_units=9,
            tower_passes=5 * len(rollouts),
            padding=1.0 - sum(lengths) / sum(n * size for n, size in chunks),
            imbalance=load_imbalance(slices, each),
            shared=0.0,
        )

    return lambda: plain.learn(batch), count


SIDES = {"ours": ours, "shared": shared, "naive": naive}
TITLES = {"ours": "ours", "shared": "ours, `rl.share_prefixes`", "naive": "naive"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--vocab", type=int, default=32_768, help="token ids of a CPU's model")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(asdict(measure(arguments.side, arguments.model, arguments.steps))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_of_this_machine(Path(scratch) / "model", vocab=arguments.vocab)
        shape = read_shape(folder)
        workload = asdict(WORK) | dict(vocab=shape.vocab, layers=shape.layers)
        measured = in_turns(
            __file__, SIDES, folder, steps=arguments.steps, turns=arguments.turns,
            output=arguments.output, workload=workload,
        )  # fmt: skip
    rows = {side: [Side(**row) for row in measured[side]] for side in SIDES}
    first = {side: turns[0] for side, turns in rows.items()}
    seconds = {side: statistics.median(s.seconds for s in rows[side]) for side in rows}
    memory = {side: max(s.peak_gib for s in rows[side]) for side in rows}
    ratios = {
        side: [s.seconds / own.seconds for s, own in zip(rows[side], rows["ours"], strict=True)]
        for side in SIDES
    }
    print(f"| one PPO update | {' | '.join(TITLES.values())} |\n|---|---|---|---|")
    table: list[tuple[str, Callable[[str], float], str]] = [
        ("forward-pass equivalents", lambda side: first[side].forward_units, "g"),
        ("prompt tokens left out, of all", lambda side: first[side].shared, ".1%"),
        ("tower passes", lambda side: first[side].tower_passes, "d"),
        ("operations counted, TFLOP", lambda side: first[side].tflop, ".2f"),
        ("padding among processed tokens", lambda side: first[side].padding, ".1%"),
        (f"load imbalance of {RANKS} ranks", lambda side: first[side].imbalance, ".1%"),
        ("time, relative", lambda side: statistics.median(ratios[side]), ".2f"),
        ("memory of the step, relative", lambda side: memory[side] / memory["ours"], ".2f"),
        ("time, s", lambda side: seconds[side], ".2f"),
        ("memory of the step, GiB", lambda side: memory[side], ".2f"),
        ("memory between steps, GiB", lambda side: first[side].kept_gib, ".2f"),
        ("actor gradient norm", lambda side: first[side].grad_norm, ".5f"),
    ]
    for name, of, form in table:
        if name.endswith((", s", "GiB")) and not ON_GPU:
            continue  # a shared CPU gives ratios alone
        print(f"| {name} | {' | '.join(format(of(side), form) for side in SIDES)} |")
    if arguments.output:
        write_result(
            arguments.output,
            finished=True,
            workload=workload,
            sides=measured,
            seconds=seconds,
            time_ratios=ratios,
            memory_ratios={side: memory[side] / memory["ours"] for side in SIDES},
        )
    for side, name in itertools.product(SIDES, ("grad_norm", "critic_loss")):
        x, y = getattr(first[side], name), getattr(first["naive"], name)
        if abs(x - y) > SAME * abs(y):
            sys.exit(f"{name} is {x} with {side} and {y} with the naive step: not the same update")


if __name__ == "__main__":
    main()
