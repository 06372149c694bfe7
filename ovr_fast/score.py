"""Per-token log-probs of given conversations, for comparing this trainer with anything else.

    torchrun --standalone --nproc-per-node 4 -m ovr_fast.score --model DIR --input FILE.jsonl \\
        --output OUT.jsonl --tp 2 --pp 2

Input, one conversation a line: ``{"messages": [{"role": ..., "content": [{"type": "image",
"image": PATH}, {"type": "text", "text": ...}]}, ...]}``; a plain string is allowed as content, and
picture paths are relative to the file. Output, a line each in order: ``{"token_ids": [...],
"logprobs": [...]}`` of the whole rendered conversation; ``logprobs[t]`` is the natural-log
probability of token t given the tokens before it, ``logprobs[0]`` is null. Never starts vLLM.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ovr_fast.batch import Picture, Sequence
from ovr_fast.config import ModelConfig
from ovr_fast.data.chat import ChatEncoder
from ovr_fast.data.packing import PositionTable, deal, pack, response_boundaries
from ovr_fast.data.vision import load_picture
from ovr_fast.learner import build_stage, score_logprobs
from ovr_fast.model.encoder import PictureEncoder
from ovr_fast.model.shape import read_shape
from ovr_fast.parallel.mesh import start_mesh


def read_conversations(path: Path) -> list[tuple[list[dict], tuple[Picture, ...]]]:
    """Messages and pictures of every line.

    Raises:
        ValueError: a malformed line or a broken picture; names file and line.
    """
    conversations = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            messages = json.loads(line)["messages"]
            parts = [
                part
                for message in messages
                if not isinstance(message["content"], str)
                for part in message["content"]
            ]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{where}: not a {{"messages": [...]}} object ({error})') from error
        pictures = []
        for part in parts:
            if part.get("type") == "image":
                file = path.parent / str(part.get("image"))
                try:
                    pictures.append(load_picture(file.read_bytes(), origin=f"{where} ({file})"))
                except OSError as error:
                    raise ValueError(f"{where}: picture {file}: {error.strerror}") from error
        conversations.append((messages, tuple(pictures)))
    if not conversations:
        raise ValueError(f"{path} holds no conversation")
    return conversations


def encode_conversations(path: Path, encoder: ChatEncoder) -> list[Sequence]:
    """Every line as a sequence whose tokens but the first all count as response.

    Raises:
        ValueError: see ``read_conversations``.
    """
    return [
        Sequence(
            tokens=encoder.encode(messages, pictures, generation_prompt=False),
            response_start=1,
            pictures=pictures,
            name=f"{path}: conversation {number}",
        )
        for number, (messages, pictures) in enumerate(read_conversations(path), 1)
    ]


def score(arguments: argparse.Namespace) -> None:
    """Score the input file and write the output file (rank 0)."""
    shape = read_shape(arguments.model)
    shape.check_tensor_parallel(arguments.tp)
    mesh = start_mesh(tensor=arguments.tp, pipeline=arguments.pp)
    settings = ModelConfig(dtype=arguments.dtype)
    stage = build_stage(shape, mesh, settings, weights=arguments.model)
    encoder = ChatEncoder(arguments.model, image_token_id=shape.image_token_id)
    sequences = encode_conversations(arguments.input, encoder)
    lengths = [len(sequence.tokens) for sequence in sequences]
    mine = deal(lengths, mesh.dp)[mesh.dp_rank]
    batches = pack(
        sequences,
        mine,
        positions=PositionTable(encoder.pictures, shape.image_token_id),
        max_tokens=max(arguments.max_tokens, *lengths),
        multiple=mesh.tp,
    )
    pictures = PictureEncoder(stage.visual, shape.vision, mesh, encoder.pictures)
    scored = score_logprobs(stage, batches, pictures, temperature=1.0)
    ends = response_boundaries(sequences)
    flat = torch.zeros(int(ends[-1]), device=mesh.device)
    for batch, logprobs in zip(batches, scored, strict=True):
        flat[batch.response_index_R.to(mesh.device)] = logprobs
    dist.all_reduce(flat, group=mesh.dp_group)  # each replica filled its own share
    if mesh.rank == 0:
        with open(arguments.output, "w") as file:
            for sequence, start, end in zip(sequences, ends[:-1], ends[1:], strict=True):
                row = {
                    "token_ids": sequence.tokens.tolist(),
                    "logprobs": [None, *flat[start:end].tolist()],
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
    except ValueError as error:
        sys.exit(f"score: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
