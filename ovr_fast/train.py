"""The one command: both stages of the recipe, or one of them.

    torchrun --standalone --nproc-per-node N -m ovr_fast.train --config FILE.toml \\
        [section.key=value ...] [--resume DIR] [--dry-run] [--profile 4:6] \\
        [--only rollout | --only train --rollouts PATH | --fake-rollouts MEAN_TOKENS]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from ovr_fast import stopping
from ovr_fast.config import Config, load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.files import files_of
from ovr_fast.data.prompts import Mixture
from ovr_fast.data.rows import DemonstrationRows
from ovr_fast.data.streams import RunData
from ovr_fast.errors import OVRFastError
from ovr_fast.evaluation.heldout import HeldOut, NoHeldOut
from ovr_fast.evaluation.in_training import AskedBenchmark, read_benchmarks
from ovr_fast.lifetime import end_with_parent, remove_torchrun_folder
from ovr_fast.observe.profiler import check_steps, parse_steps
from ovr_fast.parallel.checkpoint import check_whole, list_checkpoints, split_name
from ovr_fast.parallel.mesh import Mesh, start_mesh
from ovr_fast.parallel.offload import release_memory
from ovr_fast.plan.describe import describe
from ovr_fast.plan.layout import check_layout, check_world
from ovr_fast.recipe.build import (
    build_cold_start,
    build_ppo,
    build_whole,
    check_operators,
    trained_parameters,
)
from ovr_fast.recipe.ppo import ppo
from ovr_fast.recipe.sample import sample
from ovr_fast.recipe.sft import row_cost, sft
from ovr_fast.records import Prompt
from ovr_fast.rl.rewards import Verifier
from ovr_fast.rollout.fleet import Fleet, NoServers
from ovr_fast.rollout.given import RecordedRollouts, SyntheticRollouts
from ovr_fast.rollout.placement import check_placement
from ovr_fast.rollout.sources import RolloutSource, VLLMRollouts
from ovr_fast.run.folder import read_identity
from ovr_fast.run.resume import check_resume, check_run_folder
from ovr_fast.run.run import (
    STOP_FILE,
    ReplayRun,
    Run,
    check_weights,
    find_checkpoint,
    is_replay,
)
from ovr_fast.settings import describe_settings
from ovr_fast.shape.folder import find_model
from ovr_fast.shape.model_shape import ModelShape, read_shape
from ovr_fast.stopping import Stopped

SOURCE_FLAGS = {
    "recorded": "--only train --rollouts",
    "synthetic": "--fake-rollouts",
}
"""How to ask for each kind of rollout source but "vllm", which needs no flag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run works on, read and checked before any server or model exists."""

    base: Path  # Hugging Face folder
    shape: ModelShape
    chat: ChatTemplate
    kind: str  # of the rollout source
    folder: Path  # of the run
    checkpoint: Path | None  # to go on from
    replay: bool
    mesh: Mesh
    data: RunData
    streams: dict[str, Mixture]  # by recipe stage
    heldout: dict[str, tuple[Prompt, ...]]  # by set
    benchmarks: dict[str, AskedBenchmark]


def read_inputs(arguments: argparse.Namespace, config: Config) -> Inputs:
    """Check settings and layout, join the other ranks, and read the data.

    Raises:
        OVRFastError: something that would stop the run later; names it and how to mend it.
    """
    base = find_model(config.model.path)
    shape = read_shape(base)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    check_world(config, world)
    check_layout(config, shape, world)
    check_placement(config, world=world, local_world=local_world, on_gpu=torch.cuda.is_available())
    kind = rollout_kind(arguments)
    folder = arguments.resume or Path(config.run.root) / config.run.name
    checkpoint = find_checkpoint(
        folder, resume=arguments.resume is not None, name=arguments.checkpoint
    )
    chat = ChatTemplate(base, image_token_id=shape.image_token_id)
    stages = config.run.stages
    if arguments.only or (checkpoint is not None and split_name(checkpoint)[0] == "rl"):
        stages = ("rl",)  # what the cold start would read is not needed
    if kind == "recorded":  # brings its own prompts
        stages = ()
    mesh = start_mesh(tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    if checkpoint is not None:
        check_whole(checkpoint, mesh, identity=read_identity(folder))
    replay = is_replay(checkpoint, kind=kind, flags=SOURCE_FLAGS)
    if checkpoint is not None:  # before anything in the folder changes
        recipe_stage = split_name(checkpoint)[0]
        check_weights(checkpoint, first_weights(recipe_stage, config, base, folder), mesh)
    data = RunData.of(config, chat, mesh.from_first_rank)
    return Inputs(
        base=base,
        shape=shape,
        chat=chat,
        kind=kind,
        folder=folder,
        checkpoint=checkpoint,
        replay=replay,
        mesh=mesh,
        data=data,
        streams={stage: data.training_stream(stage) for stage in stages},
        heldout={} if arguments.only else data.evaluation_sets(),
        benchmarks={} if arguments.only else read_benchmarks(config, data),
    )


def first_weights(recipe_stage: str, config: Config, base: Path, folder: Path) -> Path:
    """The Hugging Face folder that a recipe stage begins with."""
    after = recipe_stage == "rl" and "cold_start" in config.run.stages
    return folder / "cold_start_hf" if after else base


def rollout_kind(arguments: argparse.Namespace) -> str:
    """The kind of rollout source that the command line asks for."""
    if arguments.rollouts is not None:
        return "recorded"
    return "synthetic" if arguments.fake_rollouts else "vllm"


def start_servers(
    config: Config, inputs: Inputs, run: Run, mesh: Mesh
) -> tuple[Fleet | NoServers, HeldOut | NoHeldOut, Verifier]:
    """The servers that the run needs, if any, and what is measured with them."""
    verifier = Verifier(config.reward)
    measured = bool(inputs.heldout or inputs.benchmarks)
    needed = inputs.kind == "vllm" and ("rl" in config.run.stages or measured)
    if not needed:
        return NoServers(), NoHeldOut(), verifier
    release_memory()  # of the operators' check, before a server on this GPU looks for room
    fleet = Fleet(
        config,
        shape=inputs.shape,
        chat=inputs.chat,
        mesh=mesh,
        weights=inputs.base,
        images=inputs.data.image_limits,
        log_folder=inputs.folder / "logs",
    )
    run.say(fleet.describe())
    if not measured:
        return fleet, NoHeldOut(), verifier
    heldout = HeldOut(
        inputs.heldout,
        fleet=fleet,
        verifier=verifier,
        mesh=mesh,
        max_tokens=config.rl.max_response_tokens,
        every=config.evaluation.every,
        benchmarks=inputs.benchmarks,
    )
    return fleet, heldout, verifier


def rollout_source(
    arguments: argparse.Namespace,
    config: Config,
    inputs: Inputs,
    run: Run,
    servers: Fleet | NoServers,
    verifier: Verifier,
) -> RolloutSource:
    """Where this run's rollouts come from."""
    if config.rl.score_while_sampling and inputs.kind != "vllm":
        run.say("rl.score_while_sampling: nothing is sampled here, so all passes come after")
    if config.rl.refill and inputs.kind != "vllm":
        run.say("rl.refill: nothing is sampled here, so the rollouts are trained on as they are")
    if inputs.kind == "recorded":
        return RecordedRollouts(
            arguments.rollouts,
            steps_done=run.done_in("rl"),
            replay=inputs.replay,
            vocabulary=inputs.shape.vocab,
            mesh=run.mesh,
        )
    stream = inputs.streams["rl"]
    if isinstance(servers, Fleet):
        return VLLMRollouts(
            config, stream=stream, fleet=servers, verifier=verifier, mesh=run.mesh, clock=run.clock
        )
    return SyntheticRollouts(
        config,
        stream=stream,
        shape=inputs.shape,
        chat=inputs.chat,
        mean_tokens=arguments.fake_rollouts,
        mesh=run.mesh,
    )


def train(arguments: argparse.Namespace, config: Config, closing: ExitStack) -> None:
    """All recipe stages, or the half of RL that was asked for."""
    inputs = read_inputs(arguments, config)
    mesh = inputs.mesh
    run = (ReplayRun if inputs.replay else Run)(
        config,
        mesh,
        folder=inputs.folder,
        checkpoint=inputs.checkpoint,
        base=inputs.base,
        rollout_kind=inputs.kind,
        profile=parse_steps(arguments.profile) if arguments.profile else None,
    )
    closing.callback(run.close)
    run.note_data(inputs.data)
    with run.clock("start"):
        run.say(check_operators(config, inputs.shape, mesh))
        servers, heldout, verifier = start_servers(config, inputs, run, mesh)
    closing.callback(verifier.close)
    closing.callback(servers.close)
    whole = None  # until the cold start, for a server that comes back before it
    if not config.rollout.servers and isinstance(servers, Fleet):  # they may hold any weights
        with run.clock("start"):
            whole = build_whole(config, inputs.shape, mesh, inputs.chat, weights=inputs.base)
            servers.sync(whole, version=0)
    if arguments.only == "rollout":
        source = rollout_source(arguments, config, inputs, run, servers, verifier)
        sample(run, source, inputs.chat)
        return
    if (inputs.heldout or inputs.benchmarks) and not run.resumed_in:
        with run.clock("start"):
            servers.wait_until_ready()
        with run.clock("evaluate"):
            scores = heldout.measure()
        run.record("base", 0, scores, None)
    del whole
    release_memory()
    with run.clock("start"):
        servers.sleep()
    if "cold_start" in config.run.stages and run.resumed_in != "rl" and not arguments.only:
        cold_start(config, inputs, run, servers, heldout)
    if "rl" in config.run.stages:
        with run.clock("start"):
            servers.sleep()
            weights = first_weights("rl", config, inputs.base, inputs.folder)
            run.note_weights("rl", weights)
        rl = config.rl
        run.say(
            f"stage 2, {rl.objective} with "
            + ("a critic" if rl.has_critic else f"group baselines ({rl.group_baseline})")
            + (", advantages normalised over the step" if rl.normalize_advantages else "")
            + f": {rl.prompts_per_step} prompts x {rl.samples_per_prompt} samples a step"
        )
        with run.clock("start"):
            source = rollout_source(arguments, config, inputs, run, servers, verifier)
            models = build_ppo(config, inputs.shape, mesh, inputs.chat, weights=weights)
            run.say(trained_parameters(models.actor))
        ppo(run, models, source, servers, heldout)


def cold_start(
    config: Config,
    inputs: Inputs,
    run: Run,
    servers: Fleet | NoServers,
    heldout: HeldOut | NoHeldOut,
) -> None:
    """Stage 1; its memory is free again when it returns."""
    settings = config.cold_start
    run.say(f"stage 1, cold start: {settings.steps:,} steps of {settings.rows_per_step} rows")
    with run.clock("start"):
        run.note_weights("cold_start", inputs.base)
        learner = build_cold_start(config, inputs.shape, run.mesh, inputs.chat, weights=inputs.base)
        rows = DemonstrationRows(
            inputs.streams["cold_start"],
            inputs.chat,
            row_tokens=settings.row_tokens,
            rows=settings.rows_per_step,
            turns=settings.turns,
            cost=row_cost(inputs.shape),
            replica=run.mesh.dp_rank,
            replicas=run.mesh.dp,
            dropped=inputs.data.left_out.get("cold_start", 0),
        )
        run.say(trained_parameters(learner))
    sft(run, learner, rows, servers, heldout)
    if config.run.stages == ("cold_start",):
        run.finish(learner)
    del learner
    release_memory()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked for flags that do not go together."""
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.train",
        description="Train Qwen2.5-VL by the Open Vision Reasoner recipe.",
        epilog=describe_settings(Config),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="TOML file; with --resume, the run's own")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="run folder to go on in")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="with --resume: this one, not the last; rl-000040, say",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    parser.add_argument("--only", choices=("rollout", "train"), help="one half of RL")
    parser.add_argument(
        "--rollouts", type=Path, metavar="PATH", help="recorded rollouts for --only train"
    )
    parser.add_argument(
        "--fake-rollouts", type=float, metavar="MEAN_TOKENS",
        help="train on random responses of this mean length, to measure; no vLLM",
    )  # fmt: skip
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps, such as 4:6")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(words)
    if arguments.config is None and arguments.resume is None:
        parser.error("--config FILE.toml (or --resume DIR) is needed")
    if arguments.checkpoint is not None and arguments.resume is None:
        parser.error("--checkpoint goes with --resume")
    if arguments.rollouts is not None and arguments.only != "train":
        parser.error("--rollouts goes with --only train")
    if arguments.fake_rollouts is not None:
        if arguments.only == "rollout" or arguments.rollouts is not None:
            parser.error("--fake-rollouts stands alone: it trains on random responses")
        if not 1 <= arguments.fake_rollouts < float("inf"):
            parser.error("--fake-rollouts: the mean length must be at least 1 token")
        arguments.only = "train"
    if arguments.only == "train" and arguments.rollouts is None and not arguments.fake_rollouts:
        parser.error("--only train needs --rollouts PATH or --fake-rollouts MEAN_TOKENS")
    if arguments.only == "rollout" and arguments.resume is not None:
        parser.error("--only rollout starts a folder of its own; it does not --resume")
    return arguments


def settings_for(arguments: argparse.Namespace) -> Config:
    """The resolved settings of this command.

    Raises:
        ConfigError: a setting cannot be used, or a resumed run would become another one.
    """
    if arguments.resume:
        check_run_folder(arguments.resume)
    config = load_config(arguments.config or arguments.resume / "config.toml", arguments.overrides)
    if arguments.resume:
        check_resume(config, arguments.resume)
    elif arguments.only:  # a half is RL from model.path
        config = replace(config, run=replace(config.run, stages=("rl",)))
    if arguments.only == "rollout":
        config = replace(config, run=replace(config.run, record_rollouts=True))
    if arguments.profile and arguments.rollouts is None:  # a replay has as many steps as files
        planned = {"cold_start": config.cold_start.steps, "rl": config.rl.steps}
        check_steps(arguments.profile, planned[first_stage(arguments, config)])
    return config


def first_stage(arguments: argparse.Namespace, config: Config) -> str:
    """The recipe stage that this command works on first."""
    if arguments.only:
        return "rl"
    if arguments.resume is None:
        return config.run.stages[0]
    found = find_checkpoint(arguments.resume, resume=True, name=arguments.checkpoint)
    assert found is not None
    return split_name(found)[0]


def print_plan(config: Config) -> None:
    """``--dry-run``: needs no weights and no GPU; what is here of the data is read."""
    base = find_model(config.model.path, published_shape_is_enough=True)
    shape = read_shape(base)
    world = config.parallel.world or int(os.environ.get("WORLD_SIZE", "1"))
    if config.parallel.world and "rl" in config.run.stages:  # a plan for GPUs
        check_placement(config, world=world, local_world=world, on_gpu=True)
    if os.environ.get("RANK", "0") == "0":
        print(describe(config, shape, world))
        print_data(config, base, shape)


def print_data(config: Config, base: Path, shape: ModelShape) -> None:
    """What the start would find in the data, where tokenizer and files are here.

    Raises:
        DataError: what would end the start.
    """
    stages = config.run.stages
    sources = [source for stage in stages for source in getattr(config, stage).sources]
    here = (base / "tokenizer.json").is_file() and all(
        files_of(source.path, split=source.split)
        for source in (*sources, *config.evaluation.sources)
    )
    if not here:
        print("data             not read: the tokenizer or a file is not here")
        return
    chat = ChatTemplate(base, image_token_id=shape.image_token_id)
    data = RunData.of(config, chat, lambda work: work())
    for stage in stages:
        data.training_stream(stage)
    data.evaluation_sets()
    read_benchmarks(config, data)
    for line in data.said:
        print(f"data             {line}")
    most = data.image_limits
    if most.count:
        print(
            f"images           at most {most.count} a prompt, {most.width} x {most.height} pixels"
        )


def how_to_go_on(stopped: Stopped, folder: Path | None) -> str:
    """The last line of a run that was stopped."""
    checkpoints = list_checkpoints(folder / "checkpoints") if folder else []
    if not checkpoints:
        return f"stopped by {stopped.name}; there is no checkpoint to go on from"
    recipe_stage, step = split_name(checkpoints[-1])
    return (
        f"stopped by {stopped.name}: go on after {recipe_stage} step {step} with --resume {folder}"
    )


def main() -> None:
    arguments = parse()
    stopping.install()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # nobody else would end the ranks of a dead torchrun
        end_with_parent(signal.SIGTERM)
    rank, folder, failed = os.environ.get("RANK", "0"), arguments.resume, True
    try:
        with ExitStack() as closing:
            config = settings_for(arguments)
            folder = folder or Path(config.run.root) / config.run.name
            if arguments.dry_run:
                print_plan(config)
            else:
                train(arguments, config, closing)
            failed = False
    except Stopped as stopped:
        if rank == "0":
            print(how_to_go_on(stopped, folder), flush=True)
        in_order = stopped.name in (STOP_FILE, "SIGUSR1")
        sys.exit(0 if in_order else 128 + signal.Signals[stopped.name])
    except OVRFastError as error:
        text = f"{type(error).__name__}: {error}"
        print(f"\novr_fast.train (rank {rank}): {text}", file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception:
        time.sleep(1.0)  # a rank that was stopped takes the others' collectives with it
        if stopping.asked_now():
            if rank == "0":
                print(how_to_go_on(Stopped(stopping.asked_now()), folder), flush=True)
            sys.exit(128 + signal.Signals[stopping.asked_now()])
        where = f"\novr_fast.train (rank {rank}, run folder {folder}) failed:\n"
        print(where + traceback.format_exc(), file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if dist.is_initialized() and not failed:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        remove_torchrun_folder()


if __name__ == "__main__":
    main()
