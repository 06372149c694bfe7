"""What sampling ahead buys: step time, idle servers and staleness, by setting.

    python benchmarks/overlap.py [--steps 16] [--update 1.0] [--token 0.004]

The product's own source, fleet and client beside stub servers, which take a fixed time a token;
lengths have a long tail (log-normal, the longest about 12 times the mean); training is a sleep of
``--update`` seconds. The seconds show who waits for whom, and nothing of a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import stub_server
from ovr_fast.config import load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.observe.clock import Clock
from ovr_fast.records import ImageLimits, Prompt, Rollout
from ovr_fast.rollout.fleet import Fleet
from ovr_fast.rollout.sources import VLLMRollouts
from ovr_fast.shape.model_shape import read_shape
from stub_server import StubServer

ROOT = Path(__file__).parents[1]
BASE_MODEL = ROOT / "ovr_fast" / "toy" / "base_model"
PROMPTS, SAMPLES, LIVE, MEAN = 16, 4, 16, 60.0

MODES = (
    ("strictly on-policy", []),
    ("max_staleness=1", ["rollout.max_staleness=1"]),
    ("max_staleness=2, partial", ["rollout.max_staleness=2", "rollout.partial=true"]),
)


def long_tailed(seed: int, most: int, *, mean: float) -> list[int]:
    """A response of log-normal length."""
    rng = np.random.default_rng(seed)
    length = int(rng.lognormal(np.log(mean) - 0.5, 1.0))
    return rng.integers(10, 400, max(1, min(length, most))).tolist()


class Stream:
    """Prompts without end."""

    position = 0

    def take(self, count: int) -> list[Prompt]:
        self.position += count
        return [
            Prompt(
                id=f"p{i}", data_source="s", messages=({"role": "user", "content": f"p{i}"},),
                images=(), answer="1", response=None,
            )
            for i in range(self.position - count, self.position)
        ]  # fmt: skip

    def state(self) -> dict[str, int]:
        return {"position": self.position}


class OneRank(SimpleNamespace):
    """The mesh of one process."""

    rank, device = 0, torch.device("cpu")

    def on_first_rank(self, work: Any, *, otherwise: Any) -> Any:
        return work()

    def from_first_rank(self, work: Any) -> Any:
        return work()

    def broadcast_object(self, value: Any) -> Any:
        return value


def run(overrides: list[str], *, steps: int, update_s: float, token_s: float) -> dict[str, float]:
    """Means over the second half of ``steps`` steps."""
    with tempfile.TemporaryDirectory() as folder:
        servers = [StubServer(token_s=token_s, mean=MEAN, socket=f"{folder}/{i}") for i in range(2)]
        urls = ", ".join(f'"{server.address}"' for server in servers)
        config = load_config(
            ROOT / "configs" / "tiny.toml",
            ["rollout.servers=0", f"rollout.urls=[{urls}]", f"rollout.max_in_flight={LIVE}",
             f"rl.steps={steps}", f"rl.prompts_per_step={PROMPTS}",
             f"rl.samples_per_prompt={SAMPLES}", *overrides],
        )  # fmt: skip
        shape = read_shape(BASE_MODEL)
        fleet = Fleet(
            config, shape=shape, chat=ChatTemplate(BASE_MODEL, image_token_id=shape.image_token_id),
            mesh=OneRank(), weights=Path(), images=ImageLimits(count=0, width=0, height=0),
            log_folder=Path(),
        )  # type: ignore[arg-type]  # fmt: skip
        fleet.wait_until_ready()
        fleet.client.run(fleet.sampler.serve(fleet.members))

        def like(responses: list, *about: list) -> list[Rollout]:
            return [Rollout.of(each, reward=1.0, outcome="correct") for each in responses]

        source = VLLMRollouts(
            config, stream=Stream(), fleet=fleet, verifier=SimpleNamespace(reward=like),
            mesh=OneRank(), clock=Clock(),
        )  # type: ignore[arg-type]  # fmt: skip
        rows = []
        for step in range(1, steps + 1):
            began = time.perf_counter()
            batch = source.next(step, max_tokens=2000)
            time.sleep(update_s)
            with fleet.at_rest():
                fleet.delivery.version = fleet.sampler.version = step
                for server in servers:
                    server.version = str(step)
            lengths = [len(rollout.response_tokens) for rollout in batch.rollouts]
            rows.append(
                {
                    **batch.counters,
                    "step_s": time.perf_counter() - began,
                    "tokens": float(sum(lengths)),
                }
            )
        fleet.close()
        for server in servers:
            server.stop()
    # The last step samples nothing ahead.
    late = rows[steps // 3 : -1]
    return {key: float(np.mean([row[key] for row in late])) for key in late[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--update", type=float, default=1.0, help="seconds of training a step")
    parser.add_argument("--token", type=float, default=0.004, help="seconds of a decode step")
    arguments = parser.parse_args()
    stub_server.tokens_of = long_tailed
    print(f"training {arguments.update} s a step, {PROMPTS} x {SAMPLES} responses, two servers")
    print("| rollouts | step, s | tokens/s | servers idle | staleness, mean | most |")
    print("|---|---|---|---|---|---|")
    for name, overrides in MODES:
        row = run(
            overrides, steps=arguments.steps, update_s=arguments.update, token_s=arguments.token
        )
        print(
            f"| {name} | {row['step_s']:.2f} | {row['tokens'] / row['step_s']:,.0f} | "
            f"{row['servers/idle']:.0%} | {row['rollout/staleness']:.2f} | "
            f"{row['rollout/staleness_max']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
