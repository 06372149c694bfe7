"""What every rank of a layout does in the distributed tests; rank 0 writes what it found.

Run by ``conftest.py`` under torchrun: MODELS OUTPUT LAYOUT... (folders, names of ``LAYOUTS``), one
after the other in the same processes, since starting them takes longer than what they do.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

import step_ranks
import vision_ranks
from ovr_fast import score
from ovr_fast.config import ModelConfig, OptimizerConfig, RLConfig
from ovr_fast.data.balance import greedy_partition
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.packing import pack
from ovr_fast.learner.learner import Learner
from ovr_fast.learner.passes import build_model
from ovr_fast.model.hf_weights import export_hf, export_hf_everywhere, save_hf
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.parallel.mesh import start_mesh
from ovr_fast.records import Microbatch, Minibatch, Sequence, Targets
from ovr_fast.rl.losses import PolicyLoss, ValueLoss
from ovr_fast.shape.model_shape import read_shape

LAYOUTS = {
    "one": (1, 1, 1),
    "tp2": (2, 1, 1),
    "pp2": (1, 2, 1),
    "dp2": (1, 1, 2),
    "tp2pp2": (2, 2, 1),
    "pp2dp2": (1, 2, 2),
}
"""Tensor, pipeline and data parallel sizes by name."""

CONFIG = RLConfig(kl_coef=0.1, entropy_coef=0.01, value_clip_eps=0.2)

Draws = list[dict[str, torch.Tensor]]


def cut(sequence: Sequence, response: int) -> Sequence:
    """With the last ``response`` tokens as its response."""
    return Sequence.unsampled(
        sequence.tokens,
        response_start=len(sequence.tokens) - response,
        images=sequence.images,
        name=sequence.name,
    )


def draw(sequence: Sequence, seed: int) -> dict[str, torch.Tensor]:
    """Advantages, returns and log-probs of a sequence's response, the same on every layout."""
    generator = torch.Generator().manual_seed(seed)
    size = sequence.response_length
    return {key: torch.randn(size, generator=generator) for key in ("a", "r", "l")}


def laid_out(key: str, batch: Microbatch, share: list[int], draws: Draws) -> torch.Tensor:
    """The draws of a microbatch's responses, in its order."""
    return torch.cat([draws[share[place]][key] for place in batch.sequence_ids])


def filled(batch: Microbatch, share: list[int], draws: Draws) -> Microbatch:
    """The microbatch with drawn rollout log-probs."""
    return replace(batch, rollout_logprobs_R=laid_out("l", batch, share, draws))


def targets(batch: Microbatch, share: list[int], draws: Draws, old_values: torch.Tensor) -> Targets:
    return Targets(
        old_values_R=old_values,
        advantages_R=laid_out("a", batch, share, draws),
        returns_R=laid_out("r", batch, share, draws),
        old_logprobs_R=None,
        ref_logprobs_R=laid_out("l", batch, share, draws) - 5.0,
    )


def run(models: Path, output: Path, name: str) -> None:
    """All that is compared between layouts, into ``output / NAME.pt``."""
    tp, pp, _ = LAYOUTS[name]
    mesh, layout = start_mesh(tensor=tp, pipeline=pp), name
    output = output / f"{name}.pt"
    found: dict = {}
    for name in ("tied", "wide"):
        folder = models / name
        shape = read_shape(folder)
        chat = ChatTemplate(folder, image_token_id=shape.image_token_id)
        conversations = models / "conversations" / "conversations.jsonl"
        sequences = [
            cut(sequence, 6 + i)
            for i, sequence in enumerate(score.encode_conversations(conversations, chat))
        ]
        share = greedy_partition([len(s.tokens) for s in sequences], mesh.dp)[mesh.dp_rank]
        batches = pack(
            [sequences[i] for i in share],
            positions=chat.mrope_cache(),
            max_tokens=260,
            multiple=mesh.tp,
        )
        draws = [draw(sequence, i) for i, sequence in enumerate(sequences)]
        recompute = {(2, 1): "selective", (2, 2): "full"}.get((tp, pp), "none")
        settings = ModelConfig(path="-", dtype="float32", train_vision="full", recompute=recompute)
        for kind in ("actor", "critic"):
            model = build_model(
                shape, mesh, settings, weights=folder, value_head=kind == "critic", seed=3
            )
            vision = VisionEncoder(model.visual, shape.vision, mesh, chat.image_processor)
            learner = Learner(kind, model, vision, OptimizerConfig(lr=1e-3, max_grad_norm=0.5))
            values = [torch.zeros(batch.labels_R.numel()) for batch in batches]
            if kind == "critic":
                values = learner.values(batches)
            minibatch = Minibatch(
                microbatches=tuple(filled(batch, share, draws) for batch in batches),
                targets=tuple(
                    targets(batch, share, draws, old)
                    for batch, old in zip(batches, values, strict=True)
                ),
                global_tokens=sum(sequence.response_length for sequence in sequences),
            )
            loss = ValueLoss(CONFIG) if kind == "critic" else PolicyLoss(CONFIG, 0.7)
            if mesh.dp_rank == 0 and kind == "actor":
                weights = {n: t.clone() for n, t in export_hf(model)}
                everywhere = {n: t.clone() for n, t in export_hf_everywhere(model)}
                if mesh.model_rank == mesh.tp * mesh.pp - 1:  # the last of the replica
                    torch.save(everywhere, output.with_suffix(f".{name}.last"))
                found[f"{name}/weights"] = weights
            gradients = learner.gradients(minibatch, loss)
            found[f"{name}/{kind}/gradients"] = {
                n: t.clone() for n, t in export_hf(model, values=gradients)
            }
            report = learner.update(minibatch, loss)
            found[f"{name}/{kind}/report"] = report
            found[f"{name}/{kind}/stepped"] = {n: t.clone() for n, t in export_hf(model)}
            if kind == "actor":
                save_hf(model, output.with_suffix(f".{name}.hf"), like=folder)
    found["step"] = step_ranks.run(models, mesh, output.parent / "checkpoints", layout)
    found["vision"] = vision_ranks.problems(models, mesh)
    score.score(
        argparse.Namespace(
            model=models / "wide", input=models / "conversations" / "conversations.jsonl",
            output=output.with_suffix(".jsonl"), tp=tp, pp=pp, dtype="float32", max_tokens=8192,
        )
    )  # fmt: skip
    if mesh.rank == 0:
        torch.save(found, output)
    torch.distributed.barrier()


if __name__ == "__main__":
    for layout in sys.argv[3:]:
        run(Path(sys.argv[1]), Path(sys.argv[2]), layout)
