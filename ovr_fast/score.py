"""Per-token log-probs of given conversations, for comparing this trainer with anything else.

    torchrun --standalone --nproc-per-node 4 -m ovr_fast.score --model DIR --input FILE.jsonl \\
        --output OUT.jsonl --tp 2 --pp 2

Input, a conversation a row of JSON Lines, JSON or Parquet: ``{"messages": [{"role": ...,
"content": [{"type": "image", "image": PATH}, {"type": "text", "text": ...}]}, ...]}``; plain text
is allowed as content, and image paths are relative to the file. Output, a line each in order:
``{"token_ids": [...], "logprobs": [...]}`` of the whole rendered conversation; ``logprobs[t]`` is
the natural-log probability of token t given the tokens before it, ``logprobs[0]`` is null. Never
starts vLLM.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch.distributed as dist

from ovr_fast.config import DataSource, ModelConfig
from ovr_fast.data.balance import greedy_partition
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.errors import DataError, naming
from ovr_fast.data.files import read_rows
from ovr_fast.data.formats import RowFormat
from ovr_fast.data.messages import read_conversation
from ovr_fast.data.packing import pack
from ovr_fast.data.prompts import load_images
from ovr_fast.errors import OVRFastError
from ovr_fast.learner.passes import build_model, compute_logprobs
from ovr_fast.model.vision_encoder import VisionEncoder
from ovr_fast.parallel.mesh import start_mesh
from ovr_fast.records import ImageFile, Sequence
from ovr_fast.shape.model_shape import read_shape


def read_conversations(path: Path) -> list[tuple[str, tuple[dict, ...], tuple[ImageFile, ...]]]:
    """Where each row stands, its messages and its images.

    Raises:
        DataError: a row that cannot be used; names file and row.
    """
    conversations = []
    source, notes = DataSource(path=str(path), format="messages"), Counter[str]()
    for raw in read_rows(str(path)):
        if isinstance(raw.row, DataError):
            raise raw.row
        with naming(raw.where):
            found = RowFormat(source, raw.row, raw.where).fields(raw.row, raw.where)
            conversation = read_conversation(found.prompt, found.images, system=found.system)
            images = load_images(conversation, raw, source, notes)
        conversations.append((raw.where, conversation.messages, images))
    if not conversations:
        raise DataError(f"{path} holds no conversation")
    return conversations


def encode_conversations(path: Path, chat: ChatTemplate) -> list[Sequence]:
    """Every line as a sequence whose tokens but the first all count as response.

    Raises:
        DataError: see ``read_conversations``.
    """
    sequences = []
    for where, messages, images in read_conversations(path):
        with naming(where):
            tokens = chat.encode(messages, images, generation_prompt=False)
        sequences.append(Sequence.unsampled(tokens, response_start=1, images=images, name=where))
    return sequences


def score(arguments: argparse.Namespace) -> None:
    """Score the input file and write the output file (rank 0)."""
    shape = read_shape(arguments.model)
    shape.check_tensor_parallel(arguments.tp)
    mesh = start_mesh(tensor=arguments.tp, pipeline=arguments.pp)
    settings = ModelConfig(dtype=arguments.dtype)
    model = build_model(shape, mesh, settings, weights=arguments.model)
    chat = ChatTemplate(arguments.model, image_token_id=shape.image_token_id)
    sequences = encode_conversations(arguments.input, chat)
    lengths = [len(sequence.tokens) for sequence in sequences]
    own = greedy_partition(lengths, mesh.dp)[mesh.dp_rank]
    batches = pack(
        [sequences[index] for index in own],
        positions=chat.mrope_cache(),
        max_tokens=max(arguments.max_tokens, *lengths),
        multiple=mesh.tp,
    )
    vision = VisionEncoder(model.visual, shape.vision, mesh, chat.image_processor)
    scored = compute_logprobs(model, vision, batches, temperature=1.0)
    found: dict[int, list[float]] = {}
    for batch, logprobs_R in zip(batches, scored, strict=True):
        parts = logprobs_R.split(batch.responses.lengths)
        for place, part in zip(batch.sequence_ids, parts, strict=True):
            found[own[place]] = part.tolist()
    replicas: list = [None] * mesh.dp
    dist.all_gather_object(replicas, found, group=mesh.dp_group)
    logprobs = {index: values for part in replicas for index, values in part.items()}
    if mesh.rank == 0:
        with open(arguments.output, "w") as file:
            for index, sequence in enumerate(sequences):
                row = {
                    "token_ids": sequence.tokens.tolist(),
                    "logprobs": [None, *logprobs[index]],
                }
                file.write(json.dumps(row) + "\n")
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--input", type=Path, required=True, help="conversations, JSONL")
    parser.add_argument("--output", type=Path, required=True, help="log-probs, JSONL")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--max-tokens", type=int, default=8192, help="tokens packed into one microbatch"
    )
    try:
        score(parser.parse_args())
    except OVRFastError as error:
        sys.exit(f"score: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
