"""Rehearses a training run on GPUs that are not there: does it run, does it fit, is the host ahead?

    python -m ovr_fast.rehearse --config FILE.toml [section.key=value ...] [--steps 2]
        [--ranks 0,31] [--engine] [--layers N] [--save] [--lines FILE.json]

The trainer, torch's CUDA build, its caching allocator, Megatron-core and Triton's compiler are the
real ones; the card is ``card/``: 79.6 GiB of address space that compute nothing. parallel.world is
the number of ranks. ``--ranks`` runs some of them, one after another, with their peers pretended.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from ovr_fast.config import Config, DataSource, data_parallel_size, load_config
from ovr_fast.errors import OVRFastError
from ovr_fast.rehearse.build import card_libraries
from ovr_fast.rehearse.engine import write_plugin
from ovr_fast.rehearse.hollow import (
    rehearsal_config,
    write_demonstrations,
    write_hollow_model,
    write_prompts,
)
from ovr_fast.rehearse.launch import card_environment, run_alone, run_world
from ovr_fast.rehearse.report import print_report
from ovr_fast.settings import ConfigError, to_toml
from ovr_fast.shape.folder import find_model

FOLDER = Path("runs/rehearsal")


def numbers(text: str) -> list[int]:
    """Of "0,31"."""
    return [int(word) for word in text.split(",")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.rehearse",
        description="Run training steps on pretended GPUs: errors, memory, launches, waits.",
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file of the run")
    parser.add_argument("--steps", type=int, default=2, help="of each recipe stage (2)")
    parser.add_argument(
        "--ranks", type=numbers, default=[], help="these alone, such as 0,31; default: all at once"
    )
    parser.add_argument("--layers", type=int, default=0, help="of the language model (its own)")
    parser.add_argument(
        "--engine", action="store_true", help="with vLLM on pretended GPUs, not made-up rollouts"
    )
    parser.add_argument("--save", action="store_true", help="write a checkpoint and the model too")
    parser.add_argument(
        "--lines", type=Path, help="JSON file that gets which GPU branches ran (see branches.py)"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder ({FOLDER})")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.engine and arguments.ranks:
        parser.error("--engine needs all ranks of the world: leave --ranks out")
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    return arguments


def prepare(arguments: argparse.Namespace, config: Config, world: int) -> tuple[Config, Path]:
    """The rehearsal's settings, and its files in a new folder; the settings are a TOML there."""
    folder: Path = arguments.output
    path = folder / "rehearsal.toml"
    if folder.exists() and not path.exists() and list(folder.iterdir()):
        raise ConfigError(f"--output {folder} holds something else than a rehearsal; name another")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path.touch()
    found = find_model(config.model.path, published_shape_is_enough=True)
    write_hollow_model(folder / "model", found / "config.json", layers=arguments.layers)
    replicas = data_parallel_size(
        world, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline
    )
    config = rehearsal_config(config, replicas=replicas, folder=folder, steps=arguments.steps)
    rl, cold = config.rl, config.cold_start
    prompts, texts = folder / "data" / "prompts.jsonl", folder / "data" / "texts.jsonl"
    if "rl" in config.run.stages:
        count = rl.prompts_per_step * arguments.steps
        write_prompts(prompts, count=count, tokens=rl.max_prompt_tokens)
        rl = replace(rl, sources=(DataSource(path=str(prompts)),))
    if "cold_start" in config.run.stages:
        count = cold.rows_per_step * arguments.steps
        write_demonstrations(texts, count=count, tokens=cold.row_tokens)
        cold = replace(cold, sources=(DataSource(path=str(texts)),))
    evaluation = replace(config.evaluation, sources=(), every=0)
    config = replace(config, rl=rl, cold_start=cold, evaluation=evaluation)
    if arguments.engine:  # the card records no CUDA graphs
        config = replace(config, rollout=replace(config.rollout, compile=False))
    path.write_text(to_toml(config))
    return config, path


def cards_of(config: Config, world: int, *, engine: bool) -> int:
    """Cards of the machine: the trainer's, and those of servers that do not share them."""
    rollout = config.rollout
    apart = engine and rollout.placement == "disaggregated"
    return world + apart * rollout.servers * rollout.tensor


def rehearse(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    libraries = card_libraries()
    config = load_config(arguments.config, arguments.overrides)
    world = config.parallel.world or 1
    ranks = arguments.ranks
    if any(not 0 <= rank < world for rank in ranks):
        raise ConfigError(f"--ranks {ranks}: not ranks of parallel.world={world}")
    if arguments.engine and not config.rollout.servers:
        raise ConfigError(
            "--engine starts its own servers: add 'rollout.urls=[]' and rollout.servers=1"
        )
    config, path = prepare(arguments, config, world)
    folder = arguments.output
    environment = card_environment(
        libraries,
        cards=cards_of(config, world, engine=arguments.engine) if not ranks else 1,
        name=f"{os.getpid()}",
        triton_cache=folder / "triton",
    )
    if arguments.engine:
        paths = [str(write_plugin(folder / "site")), environment["PYTHONPATH"]]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    if arguments.lines:
        environment["PRETEND_LINES"] = str(arguments.lines.resolve())
    save = "save" if arguments.save else "no-save"
    failed = 0
    for stage in config.run.stages:
        train = ["--config", str(path), f'run.stages=["{stage}"]']
        if stage == "rl" and not arguments.engine:
            train += ["--fake-rollouts", str(100 * config.rl.max_response_tokens)]
        report = str(folder / "reports" / f"{stage}.json")
        if not ranks:
            words = [report, "together", save, *train, f"run.name={stage}"]
            failed = failed or run_world(world, words, environment)
        for rank in ranks:
            words = [report, "alone", save, *train, f"run.name={stage}_{rank}"]
            failed = failed or run_alone(rank, world, words, environment)
    print_report(config, world, folder)
    return failed


def main() -> None:
    try:
        sys.exit(rehearse(parse()))
    except OVRFastError as error:
        print(f"ovr_fast.rehearse: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
