"""What every rank of a layout does in the vision tests: gradients by ``VisionEncoder`` against the
naive way, for each ``train_vision``. Part of ``ranks.py``."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from naive_encoder import NaiveEncoder
from ovr_fast.config import ModelConfig, OptimizerConfig
from ovr_fast.data.balance import greedy_partition
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.packing import pack
from ovr_fast.learner.learner import Learner
from ovr_fast.learner.passes import build_model
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.parallel.mesh import Mesh
from ovr_fast.records import Minibatch
from ovr_fast.rl.losses import cross_entropy_loss
from ovr_fast.score import encode_conversations
from ovr_fast.shape.model_shape import read_shape


def problems(models: Path, mesh: Mesh) -> list[str]:
    """What differs, on any rank; nothing should. A collective of all ranks."""
    wrong: list[str] = []
    folder = models / "wide"
    shape = read_shape(folder)
    chat = ChatTemplate(folder, image_token_id=shape.image_token_id)
    conversations = encode_conversations(models / "conversations" / "conversations.jsonl", chat)
    for only in (None, 3):  # all of them, and one image alone: fewer than ranks
        chosen = conversations if only is None else [conversations[only], conversations[0]] * 2
        samples = [sequence for sequence in chosen for _ in range(3)]
        share = greedy_partition([len(s.tokens) for s in samples], mesh.dp)[mesh.dp_rank]
        batches = pack(
            [samples[index] for index in share],
            positions=chat.mrope_cache(),
            max_tokens=400,
            multiple=mesh.tp,
        )
        minibatch = Minibatch(
            microbatches=tuple(batches),
            targets=(None,) * len(batches),
            global_tokens=len(samples),
        )
        distinct = {image.digest for batch in batches for image in batch.images}
        for train_vision in ("frozen", "merger", "full"):
            settings = ModelConfig(path="-", dtype="float32", train_vision=train_vision)
            found = []
            for kind in (VisionEncoder, NaiveEncoder):
                model = build_model(shape, mesh, settings, weights=folder)
                vision = kind(model.visual, shape.vision, mesh, chat.image_processor)
                learner = Learner("test", model, vision, OptimizerConfig())
                gradients = learner.gradients(minibatch, cross_entropy_loss)
                if kind is VisionEncoder:
                    passes = torch.tensor(float(len(distinct)))
                    dist.all_reduce(passes, group=mesh.dp_group)
                    counted = vision.read_counters()["vision/tower_passes"]
                    if counted != passes:
                        wrong.append(f"{counted} tower passes for {passes} images")
                found.append(gradients)
            wrong += compare(found, train_vision, on_first_stage=mesh.first_stage)
    everywhere: list = [None] * mesh.world
    dist.all_gather_object(everywhere, wrong, group=mesh.control_group)
    return [f"rank {rank}: {text}" for rank, texts in enumerate(everywhere) for text in texts]


def compare(found: list, train_vision: str, *, on_first_stage: bool) -> list[str]:
    """Names whose gradients differ by more than 1e-5 of their norm."""
    ours, naive = found
    vision = {name for name in ours if name.startswith("visual.")}
    expected = {"frozen": 0, "merger": 5}.get(train_vision, len(vision))
    if set(ours) != set(naive) or len(vision) != expected:
        return [f"{train_vision}: gradients of {sorted(set(ours) ^ set(naive))} and {len(vision)}"]
    # The naive way leaves the towers of later stages without gradients.
    names = sorted(set(ours) if on_first_stage else set(ours) - vision)
    largest = max(float(naive[name].abs().max()) for name in names)
    wrong = []
    for name in names:
        scale = float(naive[name].norm())
        if scale < 1e-5 * largest:
            continue  # all rounding: a key bias shifts every score alike
        error = float((ours[name] - naive[name]).norm()) / scale
        if not error <= 1e-5:
            wrong.append(f"{train_vision}: {name}: relative error {error:.1e}")
    return wrong
