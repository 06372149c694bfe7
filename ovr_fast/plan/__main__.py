"""Hours and GPU-hours of a run before it is rented, by phase; and the layouts that cost least.

    python -m ovr_fast.plan --config FILE.toml --gpus 64 [--kind H100] [--search]
        [--response-tokens 9500] [--prompt-tokens 1200] [--rates FILE.toml]
        [--against runs/NAME] [section.key=value ...]

Rates are those of ``ovr_fast/plan/rates.toml``, each with its source; what is only assumed there is
said. ``--against`` holds a finished run beside its plan, and prints by how much each half was off:
with ``--scale-training`` and ``--scale-rollouts`` those factors enter the next plan.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from ovr_fast.config import Config, load_config
from ovr_fast.errors import OVRFastError
from ovr_fast.observe.clock import TRAINING
from ovr_fast.plan.hours import StepHours, Workload, run_hours, step_hours
from ovr_fast.plan.rates import SHIPPED, End, Rates, read_rates
from ovr_fast.plan.search import search
from ovr_fast.settings import ConfigError
from ovr_fast.shape.folder import find_model
from ovr_fast.shape.model_shape import ModelShape, read_shape

ROLLOUTS = ("prefill", "decode")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.plan",
        description="Hours and GPU-hours of an RL run by phase, before it is rented.",
    )
    parser.add_argument("--config", type=Path, help="TOML file; with --against, the run's own")
    parser.add_argument(
        "--gpus", type=int, help="in all; default: parallel.world and as many again"
    )
    parser.add_argument("--kind", default="H100", help="of GPU, in the file of rates (H100)")
    parser.add_argument("--rates", type=Path, default=SHIPPED, help="TOML file of rates")
    defaults = Workload()
    parser.add_argument("--prompt-tokens", type=float, default=defaults.prompt_tokens)
    parser.add_argument("--response-tokens", type=float, default=defaults.response_tokens)
    parser.add_argument(
        "--scale-training", type=float, default=1.0, help="of the trainer's seconds"
    )
    parser.add_argument("--scale-rollouts", type=float, default=1.0, help="of the servers' seconds")
    parser.add_argument("--search", action="store_true", help="the ten cheapest layouts that fit")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="a run to hold the plan against"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if (arguments.config is None) == (arguments.against is None):
        parser.error("give --config FILE.toml or --against runs/NAME")
    return arguments


def split_gpus(config: Config, gpus: int | None) -> tuple[int, int]:
    """GPUs of the trainer and of the servers."""
    world = config.parallel.world
    if not world:
        raise ConfigError("parallel.world is 0: say how many ranks train, parallel.world=...")
    if config.rollout.placement == "colocated":
        if gpus not in (None, world):
            raise ConfigError(f"--gpus {gpus}: colocated, parallel.world={world} is all of them")
        return world, world
    gpus = gpus or 2 * world
    if gpus <= world:
        raise ConfigError(
            f"--gpus {gpus} leaves none for vLLM beside parallel.world={world}; give more, or "
            "rollout.placement=colocated"
        )
    return world, gpus - world


def scaled(step: StepHours, training: float, rollouts: float) -> StepHours:
    """With the factors that a run has shown."""
    seconds = {
        phase: value * (rollouts if phase in ROLLOUTS else training)
        for phase, value in step.seconds.items()
    }
    return replace(step, seconds=seconds)


def interval(values: list[float], form: str = ",.0f") -> str:
    """Of the value and both ends."""
    middle, low, high = (format(value, form) for value in values)
    return f"{middle} ({low} to {high})"


def report(
    config: Config,
    shape: ModelShape,
    rates: Rates,
    workload: Workload,
    arguments: argparse.Namespace,
) -> None:
    """The table of a layout."""
    train, rollout = split_gpus(config, arguments.gpus)
    ends: tuple[End, ...] = ("value", "fast", "slow")
    runs = {}
    for end in ends:
        _, parts = run_hours(
            config, shape, rates, workload, train_gpus=train, rollout_gpus=rollout, end=end
        )
        factors = arguments.scale_training, arguments.scale_rollouts
        runs[end] = [(steps, scaled(step, *factors)) for steps, step in parts]
    parts = runs["value"]
    steps = sum(count for count, _ in parts)
    gpus = parts[0][1].gpus
    where = "the same" if parts[0][1].colocated else f"{rollout} others"
    print(f"{gpus} {rates.kind}: {train} train, {where} sample; {steps:,} steps")

    def mean(of) -> float:
        return sum(count * of(step) for count, step in parts) / steps

    tokens = mean(lambda step: step.tokens)
    print(f"a step: {tokens / 1e6:,.1f} M response tokens, the mean over the run's context lengths")
    print("| phase | PFLOP | seconds | GPU-hours of the run |")
    print("|---|---|---|---|")
    for phase in parts[0][1].seconds:
        seconds = mean(lambda step, phase=phase: step.seconds[phase])
        flops = mean(lambda step, phase=phase: step.tflop.get(phase, 0.0)) / 1e3
        hours = steps * seconds * gpus / 3600
        print(f"| {phase} | {flops:,.0f} | {seconds:,.1f} | {hours:,.0f} |")

    if hidden := mean(lambda step: step.hidden_s):
        print(
            f"| hidden behind sampling | | -{hidden:,.1f} | -{steps * hidden * gpus / 3600:,.0f} |"
        )

    def total(end: End, of) -> float:
        return sum(count * of(step) for count, step in runs[end])

    spent = [total(end, lambda step: step.step_s) for end in ends]
    cost = [total(end, lambda step: step.gpu_hours) for end in ends]
    print(f"| all | | {interval([each / steps for each in spent])} | {interval(cost)} |")
    print(f"{interval([each / 86_400 for each in spent], '.1f')} days")
    tail = mean(lambda step: step.decoded.tail_seconds) * arguments.scale_rollouts
    print_modes(parts, arguments.scale_rollouts)
    print(
        f"tail: {tail:,.0f} s a step in which under half of the most responses are live "
        f"({mean(lambda step: step.decoded.most_live):,.0f} a server)"
    )
    assumed = [name for name, rate in rates.rates.items() if rate.source.startswith("assumed")]
    print(f"assumed, not measured: {', '.join(assumed)} ({arguments.rates.name})")


def print_modes(parts: list[tuple[int, StepHours]], rollouts: float) -> None:
    """What staleness buys, and who waits for whom.

    Args:
        rollouts: factor of the servers' seconds that a run has shown.
    """
    steps = sum(count for count, _ in parts)
    first = parts[0][1]

    def slower(step: StepHours) -> StepHours:
        decoded = replace(
            step.decoded,
            seconds=step.decoded.seconds * rollouts,
            full_seconds=step.decoded.full_seconds * rollouts,
        )
        return replace(step, decoded=decoded, again_s=step.again_s * rollouts)

    parts = [(count, slower(step)) for count, step in parts]
    partial = "rollout.partial=true " if first.colocated else ""
    print("| rollouts | seconds | GPU-hours | trainer idle | servers idle |\n|---|---|---|---|---|")
    for staleness in (0, 1, 2, 4):
        ahead = [(count, replace(step, staleness=staleness)) for count, step in parts]
        seconds = sum(count * step.step_s for count, step in ahead) / steps
        training = sum(count * step.training_s for count, step in ahead) / steps
        sampling = sum(count * step.sampling_s for count, step in ahead) / steps
        name = f"{partial}rollout.max_staleness={staleness}" if staleness else "strictly on-policy"
        idle = f"{1 - training / seconds:.0%} | {1 - sampling / seconds:.0%}"
        hours = steps * seconds * first.gpus / 3600
        print(f"| {name} | {seconds:,.0f} | {hours:,.0f} | {' | ' if first.colocated else idle} |")


def print_search(
    config: Config, shape: ModelShape, rates: Rates, workload: Workload, gpus: int
) -> None:
    """The ten cheapest layouts."""
    found = search(config, shape, rates, workload, gpus)
    if not found:
        raise ConfigError(
            f"no layout of {gpus} {rates.kind} fits: shorten rl.max_prompt_tokens or "
            "rl.max_response_tokens, or take more GPUs"
        )
    print(f"{len(found)} layouts of {gpus} {rates.kind} fit; GPU-hours, days, GiB of a card:")
    for one in found[:10]:
        print(f"{one.gpu_hours:9,.0f} {one.days:6.1f} {one.card_gib:6.1f}  {one.words}")


def against(folder: Path, rates: Rates, arguments: argparse.Namespace) -> None:
    """A finished run's median step beside its plan."""
    config = load_config(folder / "config.toml", arguments.overrides)
    if not config.parallel.world:
        ranks = json.loads((folder / "env.json").read_text())["world"]
        config = replace(config, parallel=replace(config.parallel, world=ranks))
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"--against {folder}: {error}") from error
    rows = [row for row in map(json.loads, lines) if row["stage"] == "rl" and row["step"] > 1]
    if not rows:
        raise ConfigError(f"--against {folder}: metrics.jsonl has no step of RL after the first")
    shape = read_shape(find_model(config.model.path, published_shape_is_enough=True))

    def median(key: str) -> float:
        return statistics.median(row.get(key, 0.0) for row in rows)

    workload = replace(
        Workload(prompt_tokens=arguments.prompt_tokens),
        response_tokens=median("rollout/length_tokens"),
    )
    train, rollout = split_gpus(config, arguments.gpus)
    limit = int(median("rollout/limit_tokens"))
    step = step_hours(
        config, shape, rates, workload, train_gpus=train, rollout_gpus=rollout, limit=limit
    )
    print(f"{folder}: {len(rows)} steps, median seconds beside the plan for {rates.kind}")
    print("| phase | run | plan |\n|---|---|---|")
    planned = {**step.seconds, "generate": step.rollout_s}
    moved = planned.pop("offload", 0.0)  # a run's copies are inside its phases

    def ran(phase: str) -> float:
        """Of the run; what it hid behind sampling is the targets'."""
        return median(f"time/{phase}_s") + (phase == "targets") * median("time/hidden_s")

    for phase in ("generate", *TRAINING, "weight_sync"):
        seconds = ran(phase)
        if seconds or phase in planned:
            print(f"| {phase} | {seconds:,.2f} | {planned.get(phase, 0.0):,.2f} |")
    training = sum(map(ran, TRAINING))
    factors = {
        "--scale-training": training / (moved + sum(planned.get(phase, 0.0) for phase in TRAINING)),
        "--scale-rollouts": median("time/generate_s") / step.rollout_s,
    }
    print(
        "for the next plan: " + " ".join(f"{name} {value:.3g}" for name, value in factors.items())
    )


def main() -> None:
    arguments = parse()
    try:
        rates = read_rates(arguments.kind, arguments.rates)
        if arguments.against:
            against(arguments.against, rates, arguments)
            return
        config = load_config(arguments.config, arguments.overrides)
        shape = read_shape(find_model(config.model.path, published_shape_is_enough=True))
        workload = Workload(
            prompt_tokens=arguments.prompt_tokens, response_tokens=arguments.response_tokens
        )
        if arguments.search:
            gpus = arguments.gpus or sum(split_gpus(config, None))
            print_search(config, shape, rates, workload, gpus)
        else:
            report(config, shape, rates, workload, arguments)
    except OVRFastError as error:
        print(f"ovr_fast.plan: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
