"""What every rank of a layout does in the vision tests: gradients by ``PictureEncoder`` against the
naive way, for each ``train_vision``. Run under torchrun: MODELS_FOLDER TP PP"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from naive_encoder import NaiveEncoder
from ovr_fast.config import ModelConfig, OptimizerConfig
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.packing import PositionTable, deal, pack
from ovr_fast.learner import Learner, build_stage, cross_entropy_head
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.shape import read_shape
from ovr_fast.parallel.mesh import start_mesh
from ovr_fast.rl.losses import cold_start_loss
from ovr_fast.score import encode_conversations


def main(models: Path, tp: int, pp: int) -> None:
    mesh = start_mesh(tensor=tp, pipeline=pp)
    folder = models / "wide"
    shape = read_shape(folder)
    encoder = ChatEncoder(folder, image_token_id=shape.image_token_id)
    conversations = encode_conversations(models / "conversations" / "conversations.jsonl", encoder)
    for only in (None, 3):  # all of them, and one picture alone: fewer than ranks
        chosen = conversations if only is None else [conversations[only], conversations[0]] * 2
        samples = [sequence for sequence in chosen for _ in range(3)]
        share = deal([len(s.tokens) for s in samples], mesh.dp)[mesh.dp_rank]
        batches = pack(
            samples,
            share,
            positions=PositionTable(encoder.pictures, shape.image_token_id),
            max_tokens=400,
            multiple=mesh.tp,
        )
        distinct = {picture.digest for batch in batches for picture in batch.pictures}
        for train_vision in ("frozen", "merger", "full"):
            settings = ModelConfig(path="-", dtype="float32", train_vision=train_vision)
            found = []
            for kind in (PictureEncoder, NaiveEncoder):
                stage = build_stage(shape, mesh, settings, weights=folder)
                pictures = kind(stage.visual, shape.vision, mesh, encoder.pictures)
                learner = Learner("test", stage, pictures, OptimizerConfig())

                def loss(rows, batch, stage=stage, samples=samples):
                    head = cross_entropy_head(stage, rows, batch)
                    return cold_start_loss(head, batch, global_tokens=len(samples))

                gradients = learner.gradients(batches, loss)
                if kind is PictureEncoder:
                    passes = torch.tensor(float(len(distinct)))
                    dist.all_reduce(passes, group=mesh.dp_group)
                    assert pictures.read_counters()["vision/tower_passes"] == passes
                found.append(gradients)
            compare(found, train_vision, on_first_stage=mesh.first_stage)
    dist.barrier()


def compare(found: list, train_vision: str, *, on_first_stage: bool) -> None:
    ours, naive = found
    assert set(ours) == set(naive)
    vision = {name for name in ours if name.startswith("visual.")}
    expected = {"frozen": 0, "merger": 5}.get(train_vision)
    assert expected is None or len(vision) == expected, sorted(vision)
    # The naive way leaves the towers of later stages without gradients.
    names = sorted(set(ours) if on_first_stage else set(ours) - vision)
    largest = max(float(naive[name].abs().max()) for name in names)
    for name in names:
        scale = float(naive[name].norm())
        if scale < 1e-5 * largest:
            continue  # all rounding: a key bias shifts every score alike
        error = float((ours[name] - naive[name]).norm()) / scale
        assert error <= 1e-5, f"{train_vision}: {name}: relative error {error:.1e}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
