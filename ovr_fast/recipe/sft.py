"""Stage 1, linguistic cold start (OVR 3.1): next-token loss on response tokens, text only, packed
rows. ``sft`` is the recipe."""

from __future__ import annotations

from collections.abc import Callable

from ovr_fast.config import Config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.packing import pack
from ovr_fast.data.rows import DemonstrationRows, RowBatch
from ovr_fast.evaluation.heldout import Evaluation
from ovr_fast.learner.learner import Learner
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.plan.flops import COLD_START_PASSES
from ovr_fast.records import Minibatch
from ovr_fast.rl.losses import cross_entropy_loss
from ovr_fast.rollout.fleet import Servers
from ovr_fast.run.lines import cold_start_line
from ovr_fast.run.resume import State
from ovr_fast.run.run import Run
from ovr_fast.shape.cost import sequence_flops
from ovr_fast.shape.model_shape import ModelShape


def sft(
    run: Run, learner: Learner, rows: DemonstrationRows, servers: Servers, evaluation: Evaluation
) -> None:
    """Each step: one update on a global batch of packed rows. The servers get the last weights."""
    config = run.config
    state: State = {"cold_start": learner, "rows": rows}
    with run.clock("start"):
        run.begin_or_resume("cold_start", state)
    for number in run.steps(config.cold_start.steps):
        with run.step(number) as step:
            with step.phase("pack"):
                batch = rows.next()
                minibatch = pack_rows(batch, config, rows.chat, run.mesh)
            with step.phase("update"):
                update = learner.update(minibatch, cross_entropy_loss)
            metrics = row_metrics(batch, update, learner, config, rows.dropped)
            if number == run.last_step:
                with step.phase("weight_sync"):
                    servers.sync(learner, version=0)
                with step.phase("evaluate"):
                    metrics |= evaluation.measure()
            step.record(metrics, cold_start_line)
        if run.save_is_due(number):
            run.save(number, state)
    run.export(learner, "cold_start_hf")


def pack_rows(batch: RowBatch, config: Config, chat: ChatTemplate, mesh: Mesh) -> Minibatch:
    """This replica's rows, one microbatch each."""
    positions = chat.mrope_cache()
    microbatches = [
        microbatch
        for row in batch.own
        for microbatch in pack(
            row, positions=positions, max_tokens=config.cold_start.row_tokens, multiple=mesh.tp
        )
    ]
    return Minibatch(
        microbatches=tuple(microbatches),
        targets=(None,) * len(microbatches),
        global_tokens=sum(example.trained for row in batch.rows for example in row),
    )


def row_cost(shape: ModelShape) -> Callable[[int, int], float]:
    """FLOPs of a demonstration by its tokens and trained tokens."""

    def flops(tokens: int, trained: int) -> float:
        return sequence_flops(shape, tokens, trained, COLD_START_PASSES)

    return flops


def row_metrics(
    batch: RowBatch, update: dict[str, float], learner: Learner, config: Config, dropped: int
) -> dict[str, float]:
    """A cold-start step's metrics, but for its times."""
    examples = [example for row in batch.rows for example in row]
    tokens = sum(example.tokens for example in examples)
    cost = row_cost(learner.model.shape)
    flops = sum(cost(example.tokens, example.trained) for example in examples)
    return {
        "cold_start/loss": update["loss"] / update["tokens"],
        "cold_start/grad_norm": update["grad_norm"],
        "cold_start/lr": update["lr"],
        "cold_start/tokens": float(tokens),
        "cold_start/response_tokens": update["tokens"],
        "cold_start/examples": float(len(examples)),
        "cold_start/empty_share": 1.0 - tokens / (len(batch.rows) * config.cold_start.row_tokens),
        "cold_start/dropped": float(dropped),
        "perf/train_tflop": flops / 1e12,
    }
