"""Stage 2, multimodal PPO: a step is ``collect`` (sample, score), ``PPO.learn`` (pack, estimate,
update) and ``PPO.publish`` (give the engine the new weights)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ovr_fast.batch import PackedBatch, Prompt, Rollout, Sequence
from ovr_fast.config import FROZEN_PARTS, Config
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.packing import PositionTable, deal, level, pack
from ovr_fast.learner import (
    Learner,
    policy_head,
    score_logprobs,
    score_values,
)
from ovr_fast.model.cost import Passes, passes_of, sequence_flops, tower_flops
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.qwen25_vl import Qwen25VLStage
from ovr_fast.observe.clock import Clock
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.rl.losses import (
    PolicyTargets,
    actor_loss,
    critic_loss,
    global_moments,
    normalize_advantages,
)
from ovr_fast.rl.rewards import OUTCOMES, Verifier
from ovr_fast.rollout.engine import RolloutEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class PPO:
    """The parts of the training half. ``learn`` is the recipe."""

    config: Config
    mesh: Mesh
    actor: Learner
    critic: Learner
    reference: Qwen25VLStage | None  # None when the KL term is off
    reference_encoder: PictureEncoder | None
    engine: RolloutEngine | None  # None where rollouts come from elsewhere
    encoder: ChatEncoder
    clock: Clock

    def learn(self, step: int, prompts: list[Prompt], rollouts: list[Rollout]) -> dict[str, float]:
        """Update critic and actor on scored rollouts, whoever made them. Returns the metrics."""
        rl, clock = self.config.rl, self.clock
        with clock("pack"):
            work = self._pack(rollouts, prompts, seed=step)
        with clock("vision"):
            if not self.actor.encoder.trained:  # once for every pass of the step
                self.actor.encoder.hold(p for batch in work.batches for p in batch.pictures)
        with clock("targets"):
            targets = self._targets(work)

        reports: dict[str, list[dict[str, float]]] = {"critic": [], "actor": []}
        with clock("critic"), self.critic.on_device():
            for minibatch in work.minibatches(rl.critic_steps):
                reports["critic"].append(self._update_critic(minibatch, targets))
        with clock("actor"), self.actor.on_device():
            for minibatch in work.minibatches(rl.policy_steps):
                reports["actor"].append(self._update_actor(minibatch, targets))
        return self._summarize(rollouts, work, targets, reports)

    def publish(self, policy_version: int) -> None:
        """Give the servers the actor's weights, where there are servers."""
        if self.engine is None:
            return
        with self.clock("weight_sync"), self.actor.on_device(weights_alone=True):
            self.engine.load(
                self.actor.stage,
                policy_version=policy_version,
                skip_parts=FROZEN_PARTS[self.config.model.train_vision],
            )

    def _pack(self, rollouts: list[Rollout], prompts: list[Prompt], *, seed: int) -> Work:
        sequences = sequences_of(rollouts, prompts, self.encoder.image_token_id)
        # A trained tower encodes a picture once a minibatch: its samples stay together.
        together = self.critic.encoder.trained
        costs = self.costs(sequences, rollouts)
        shares = split_units(
            costs,
            [r.prompt_index if together else i for i, r in enumerate(rollouts)],
            homes=[r.prompt_index for r in rollouts],
            units=self.config.rl.critic_steps,
            ranks=self.mesh.dp,
            seed=(self.config.run.seed, seed),
        )
        own = [index for unit in shares for index in unit[self.mesh.dp_rank]]
        place = {index: here for here, index in enumerate(own)}
        own_sequences = [sequences[index] for index in own]
        positions = PositionTable(self.encoder.pictures, self.encoder.image_token_id)
        units = [
            Unit(
                batches=pack(
                    own_sequences,
                    [place[index] for index in unit[self.mesh.dp_rank]],
                    positions=positions,
                    max_tokens=self.config.rl.max_tokens_per_microbatch,
                    multiple=self.mesh.tp,
                    costs=[costs[index] for index in own],
                ),
                global_tokens=sum(sequences[i].response_length for share in unit for i in share),
            )
            for unit in shares
        ]
        return Work(
            units=units,
            rollouts=[rollouts[index] for index in own],
            tokens=sum(len(sequence.tokens) for sequence in own_sequences),
            tflop=sum(costs) / 1e12,
            imbalance=max(imbalance(unit, costs) for unit in shares),
        )

    @property
    def _passes(self) -> Passes:
        """What the settings need of the models in a step."""
        return passes_of(
            old_logprobs=self.config.rl.policy_steps > 1, ref_logprobs=self.reference is not None
        )

    def costs(self, sequences: list[Sequence], rollouts: list[Rollout]) -> list[float]:
        """FLOPs of each rollout in all passes of the step; a picture's are shared by its samples.
        A frozen tower makes one pass, a trained one as many as the language models."""
        shape, passes = self.actor.stage.shape, self._passes
        tower_passes = passes.trunk if self.critic.encoder.trained else 1
        samples = Counter(rollout.prompt_index for rollout in rollouts)
        towers: dict[int, float] = {}
        costs = []
        for sequence, rollout in zip(sequences, rollouts, strict=True):
            prompt = rollout.prompt_index
            if prompt not in towers:
                grids = [self.encoder.pictures.grid(picture) for picture in sequence.pictures]
                whole = tower_passes * sum(tower_flops(grid, shape.vision) for grid in grids)
                towers[prompt] = whole / samples[prompt]
            length = len(sequence.tokens)
            costs.append(
                towers[prompt] + sequence_flops(shape, length, sequence.response_length, passes)
            )
        return costs

    def _targets(self, work: Work) -> PolicyTargets:
        """Values, advantages, and only those log-probs that the mathematics needs."""
        rl, device = self.config.rl, self.mesh.device
        batches = work.batches
        ends = work.boundaries
        with self.critic.on_device(weights_alone=True):
            values = score_values(self.critic.stage, batches, self.critic.encoder)
        old_values_R = gather(batches, values, ends, device)
        rewards_R = torch.zeros_like(old_values_R)
        rewards = [float(rollout.reward or 0.0) for rollout in work.rollouts]
        rewards_R[torch.from_numpy(ends[1:] - 1).to(device)] = torch.tensor(rewards, device=device)
        advantages_R, returns_R = self.actor.stage.operators.packed_gae(
            rewards_R,
            old_values_R,
            torch.from_numpy(ends),
            gamma=rl.gamma,
            gae_lambda=rl.gae_lambda,
        )
        if rl.normalize_advantages:
            advantages_R = normalize_advantages(advantages_R, self.mesh.dp_group)
        sampled = np.concatenate([rollout.rollout_logprobs for rollout in work.rollouts])
        return PolicyTargets(
            old_values_R=old_values_R,
            advantages_R=advantages_R,
            returns_R=returns_R,
            rollout_logprobs_R=torch.from_numpy(sampled).to(device),
            old_logprobs_R=None if rl.policy_steps == 1 else self._old_logprobs(batches, ends),
            ref_logprobs_R=(
                None
                if self.reference is None
                else self._logprobs(self.reference, self.reference_encoder, batches, ends)
            ),
        )

    def _old_logprobs(self, batches: list[PackedBatch], ends: np.ndarray) -> Tensor:
        """With one policy step nobody asks: the ratio of the policy to itself is 1, and the loss
        takes its value and gradient from the one forward that is trained."""
        with self.actor.on_device(weights_alone=True):
            return self._logprobs(self.actor.stage, self.actor.encoder, batches, ends)

    def _logprobs(
        self,
        stage: Qwen25VLStage,
        encoder: PictureEncoder | None,
        batches: list[PackedBatch],
        ends: np.ndarray,
    ) -> Tensor:
        assert encoder is not None
        temperature = self.config.rollout.temperature
        scored = score_logprobs(stage, batches, encoder, temperature=temperature)
        return gather(batches, scored, ends, self.mesh.device)

    def _update_critic(self, minibatch: Unit, targets: PolicyTargets) -> dict[str, float]:
        def loss(rows_RH: Tensor, batch: PackedBatch):
            return critic_loss(
                self.critic.stage.value_head(rows_RH),
                batch,
                targets,
                config=self.config.rl,
                global_tokens=minibatch.global_tokens,
                operators=self.critic.stage.operators,
            )

        return self.critic.update(minibatch.batches, loss)

    def _update_actor(self, minibatch: Unit, targets: PolicyTargets) -> dict[str, float]:
        stage, temperature = self.actor.stage, self.config.rollout.temperature

        def loss(rows_RH: Tensor, batch: PackedBatch):
            return actor_loss(
                policy_head(stage, rows_RH, batch, temperature=temperature),
                batch,
                targets,
                config=self.config.rl,
                global_tokens=minibatch.global_tokens,
            )

        return self.actor.update(minibatch.batches, loss)

    def _vision_metrics(self) -> dict[str, float]:
        """Counters of all towers of the step."""
        encoders = {id(e): e for e in (self.actor.encoder, self.critic.encoder)}
        if self.reference_encoder is not None:
            encoders[id(self.reference_encoder)] = self.reference_encoder
        totals: Counter[str] = Counter()
        for encoder in encoders.values():
            totals.update(encoder.read_counters())
        return dict(totals)

    def _work_metrics(self, work: Work) -> dict[str, float]:
        """Operations of the step, and what packing and dealing left unused on all replicas."""
        rooms = len(work.batches) * self.config.rl.max_tokens_per_microbatch
        used = torch.tensor([work.tokens, rooms], dtype=torch.float64, device=self.mesh.device)
        dist.all_reduce(used, group=self.mesh.dp_group)
        tokens, room = used.tolist()
        return {
            "perf/train_tflop": work.tflop,
            "perf/forward_units": float(self._passes.trunk),
            "pack/empty_share": 1.0 - tokens / room,
            "pack/imbalance": work.imbalance,
        }

    def _summarize(
        self,
        rollouts: list[Rollout],
        work: Work,
        targets: PolicyTargets,
        reports: dict[str, list[dict[str, float]]],
    ) -> dict[str, float]:
        group = self.mesh.dp_group
        _, value_mean, _ = global_moments(targets.old_values_R, group)
        _, return_mean, return_deviation = global_moments(targets.returns_R, group)
        _, _, error = global_moments(targets.returns_R - targets.old_values_R, group)
        actor = {key: sum(r[key] for r in reports["actor"]) for key in reports["actor"][0]}
        critic = {key: sum(r[key] for r in reports["critic"]) for key in reports["critic"][0]}
        steps = len(reports["actor"]), len(reports["critic"])
        first = reports["actor"][0]
        metrics = {
            **rollout_metrics(rollouts),
            **self._vision_metrics(),
            **self._work_metrics(work),
            "rollout/visual_tokens": float(
                sum((r.prompt_tokens == self.encoder.image_token_id).sum() for r in rollouts)
            ),
            # Of the first update only: later ones compare a policy that has already moved.
            "rollout/logprob_gap": first["logprob_gap"] / first["tokens"],
            "rollout/kl": first["rollout_kl"] / first["tokens"],
            "actor/loss": actor["loss"] / actor["tokens"],
            "actor/entropy": actor["entropy"] / actor["tokens"],
            "actor/ratio": actor["ratio"] / actor["tokens"],
            "actor/clip_frac": actor["clipped"] / actor["tokens"],
            "actor/grad_norm": actor["grad_norm"] / steps[0],
            "actor/lr": reports["actor"][-1]["lr"],
            "critic/loss": critic["loss"] / critic["tokens"],
            "critic/grad_norm": critic["grad_norm"] / steps[1],
            "critic/lr": reports["critic"][-1]["lr"],
            "critic/value": value_mean,
            "critic/return": return_mean,
            # Share of the returns' variance that the old values explain; 0 where there is none.
            "critic/explained_variance": (
                1.0 - (error / return_deviation) ** 2 if return_deviation > 1e-6 else 0.0
            ),
        }
        if "kl" in actor:
            metrics["actor/kl"] = actor["kl"] / actor["tokens"]
        return metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The smallest part of a rollout batch that an optimizer steps on: this rank's microbatches of
    it. The critic's minibatch is one unit, the actor's one or several."""

    batches: list[PackedBatch]
    global_tokens: int  # response tokens of the part on all data-parallel ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """This rank's share of a step, packed once for all its passes."""

    units: list[Unit]
    rollouts: list[Rollout]  # this rank's, in the order that targets are laid out in
    tokens: int  # of this rank's sequences
    tflop: float  # 1e12 operations of the step, all ranks and passes
    imbalance: float  # how much the dearest data-parallel share of a unit is over the mean

    @property
    def batches(self) -> list[PackedBatch]:
        return [batch for unit in self.units for batch in unit.batches]

    @property
    def boundaries(self) -> np.ndarray:
        """[S + 1] int64, where each of this rank's responses stands when laid end to end."""
        lengths = [len(rollout.response_tokens) for rollout in self.rollouts]
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def minibatches(self, count: int) -> list[Unit]:
        """The units joined into ``count`` optimizer steps' worth."""
        size = len(self.units) // count
        joined = [self.units[i : i + size] for i in range(0, len(self.units), size)]
        return [
            Unit(
                batches=[batch for unit in group for batch in unit.batches],
                global_tokens=sum(unit.global_tokens for unit in group),
            )
            for group in joined
        ]


def sequences_of(
    rollouts: list[Rollout], prompts: list[Prompt], image_token_id: int
) -> list[Sequence]:
    """Prompt and response of each rollout as one row of tokens.

    Raises:
        ValueError: a response holds a picture's placeholder; names the prompt.
    """
    for rollout in rollouts:
        places = np.flatnonzero(rollout.response_tokens == image_token_id)
        if places.size:
            raise ValueError(
                f"the response to {prompts[rollout.prompt_index].id} holds an image "
                f"placeholder at token {places[0]}, which stands for no picture; the engine "
                "must not sample it"
            )
    return [
        Sequence(
            tokens=np.concatenate([r.prompt_tokens, r.response_tokens]),
            response_start=len(r.prompt_tokens),
            pictures=prompts[r.prompt_index].pictures,
            name=prompts[r.prompt_index].id,
        )
        for r in rollouts
    ]


def split_units(
    costs: list[float],
    groups: list[int],
    *,
    units: int,
    ranks: int,
    seed: tuple[int, int],
    homes: list[int] | None = None,
) -> list[list[list[int]]]:
    """Cut a rollout batch into minibatch units and deal each to the data-parallel ranks.

    Rollouts of one group stay in one unit. Which form a unit depends on the seed alone, not on the
    number of ranks, so another layout trains on the same minibatches. Over the ranks, rollouts go
    where most of their home is, so that a picture is encoded by few replicas, and single ones are
    moved until every rank has the same cost of each unit.

    Args:
        costs: of each rollout.
        groups: number of the group of each.
        homes: number of what should share a rank, such as the prompt; None: nothing should.

    Returns:
        ``[unit][rank]`` lists of indices.

    Raises:
        ValueError: a rank would get no rollout of a unit.
    """
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    if len(costs) < units * ranks or len(members) < units:
        raise ValueError(
            f"{len(costs)} rollouts a step are too few for {units} critic steps on {ranks} "
            "data-parallel ranks; raise rl.prompts_per_step or lower rl.critic_steps"
        )
    home_of = homes or list(range(len(costs)))
    home_costs: dict[int, float] = {}
    for index, home in enumerate(home_of):
        home_costs[home] = home_costs.get(home, 0.0) + costs[index]
    dealt = deal(list(home_costs.values()), ranks)
    homes_in_order = list(home_costs)
    rank_of = {homes_in_order[i]: rank for rank, share in enumerate(dealt) for i in share}
    names = list(members)
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    result = []
    for unit in range(units):
        chosen = sorted(index for place in order[unit::units] for index in members[names[place]])
        shares: list[list[int]] = [[] for _ in range(ranks)]
        for index in chosen:
            shares[rank_of[home_of[index]]].append(index)
        level(shares, costs)
        if not all(shares):
            raise ValueError(
                f"a minibatch of {len(chosen)} rollouts leaves one of {ranks} data-parallel ranks "
                "without any; raise rl.prompts_per_step or lower rl.critic_steps"
            )
        result.append(shares)
    return result


def imbalance(shares: list[list[int]], costs: list[float]) -> float:
    """How much the dearest share is over the mean: the time that the other ranks wait."""
    loads = [sum(costs[index] for index in share) for share in shares]
    return max(loads) * len(loads) / sum(loads) - 1.0


def gather(
    batches: list[PackedBatch], scored: list[Tensor], ends: np.ndarray, device: torch.device
) -> Tensor:
    """Per-microbatch results laid end to end in the order of this rank's responses, fp32."""
    flat_R = torch.empty(int(ends[-1]), dtype=torch.float32, device=device)
    for batch, values_R in zip(batches, scored, strict=True):
        flat_R[batch.response_index_R.to(device)] = values_R.float()
    return flat_R


def collect(
    prompts: list[Prompt],
    *,
    step: int,
    config: Config,
    engine: RolloutEngine,
    verifier: Verifier,
    mesh: Mesh,
    clock: Clock,
    max_tokens: int,
) -> list[Rollout]:
    """The rollout half of a step: scored responses to every prompt, each up to ``max_tokens``."""
    with clock("generate"):
        rollouts = engine.generate(
            prompts, step=step, samples=config.rl.samples_per_prompt, max_tokens=max_tokens
        )
    with clock("reward"):
        return score_rollouts(rollouts, prompts, verifier, mesh)


def score_rollouts(
    rollouts: list[Rollout], prompts: list[Prompt], verifier: Verifier, mesh: Mesh
) -> list[Rollout]:
    """The rollouts with rewards. Rank 0 checks, every rank gets them or the same failure."""
    result: list[Rollout] | Exception | None = None
    if mesh.rank == 0:
        try:
            answers = [prompts[rollout.prompt_index].answer or "" for rollout in rollouts]
            result = verifier.score(rollouts, answers)
        except RuntimeError as error:
            result = error
    result = mesh.from_first(result)
    if isinstance(result, Exception):
        raise result
    assert result is not None
    return result


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Reward, lengths and outcome shares of scored rollouts."""
    lengths = np.array([len(rollout.response_tokens) for rollout in rollouts])
    outcomes = Counter(rollout.outcome for rollout in rollouts)
    solved: dict[int, list[float]] = {}
    for rollout in rollouts:
        solved.setdefault(rollout.prompt_index, []).append(float(rollout.reward or 0.0))
    means = np.array([np.mean(rewards) for rewards in solved.values()])
    return {
        "rollout/reward": float(np.mean([rollout.reward or 0.0 for rollout in rollouts])),
        "rollout/length_tokens": float(lengths.mean()),
        "rollout/length_max_tokens": float(lengths.max()),
        "rollout/response_tokens": float(lengths.sum()),
        "rollout/truncated": float(np.mean([r.finish_reason == "length" for r in rollouts])),
        # Prompts whose samples differ in reward: the others teach the actor little.
        "rollout/mixed_prompts": float(((means > 0) & (means < 1)).mean()),
        "rollout/policy_version": float(rollouts[0].policy_version),
        **{f"reward/{name}": outcomes[name] / len(rollouts) for name in OUTCOMES},
    }
