"""Responses to a benchmark's questions, from a model folder or an OpenAI-compatible address."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ovr_fast.data.images import ImageProcessor, image_limits
from ovr_fast.evaluation.adapter import EvaluationError
from ovr_fast.evaluation.protocol import Protocol, prompt_parts, sample_seed
from ovr_fast.evaluation.question import Benchmark, Question
from ovr_fast.evaluation.records import (
    Appender,
    ResponseRecord,
    check_manifest,
    read_records,
    write_records,
)
from ovr_fast.records import ImageLimits
from ovr_fast.rollout.client import Address, Client, RequestRefused, ServerFailed
from ovr_fast.rollout.server import Server, ServerOptions

ATTEMPTS = 3
PROMPT_ROOM = 16_384
"""Tokens for a prompt beside the longest response, where the model has as many positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Who answers."""

    address: Address
    model: str  # its name there
    identity: str  # what a manifest says of it
    server: Server | None = None
    vllm: bool = True  # takes vLLM's own sampling settings beside OpenAI's

    def close(self) -> None:
        """Stop it, if it was started here."""
        if self.server is not None:
            self.server.stop()


def given(url: str, model: str, *, vllm: bool = True) -> Endpoint:
    """A server at an OpenAI-compatible address, such as http://host:8000/v1."""
    address = Address(url.removesuffix("/").removesuffix("/v1"))
    return Endpoint(address=address, model=model, identity=model, vllm=vllm)


def started(
    folder: Path,
    client: Client,
    benchmarks: List[Benchmark],
    protocol: Protocol,
    *,
    log: Path,
    dtype: str,
    tensor: int,
    kv_cache_gib: int,
    devices: str | None,
    timeout_s: float,
) -> Endpoint:
    """A vLLM server of a model folder, ready to answer.

    Raises:
        ServerFailed: it stopped, or made no progress.
    """
    from ovr_fast.shape.model_shape import read_shape

    read_shape(folder)  # a folder of another family ends here, before a server has started
    longest = max(protocol.of(b.adapter).max_tokens for b in benchmarks)
    positions = _positions(folder)
    questions = [question for benchmark in benchmarks for question in benchmark.questions]
    limits = ImageLimits(count=0, width=0, height=0)
    if any(question.images for question in questions):
        limits = image_limits(questions, ImageProcessor(folder))
    options = ServerOptions(
        model=folder,
        dtype=dtype,
        max_model_len=min(positions, longest + PROMPT_ROOM),
        images=limits,
        transfer_backend="gloo",
        compiled=True,
        sleeps=False,
        seed=0,
        kv_cache_gib=kv_cache_gib,
        gpu_memory_utilization=0.9,
        tensor_parallel=tensor,
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    server = Server(options, log=log, devices=devices)
    try:
        client.run(server.ready(client, timeout_s))
    except BaseException:
        server.stop()
        raise
    return Endpoint(
        address=server.address, model="policy", identity=model_digest(folder), server=server
    )


def _positions(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    return int(text.get("max_position_embeddings", config.get("max_position_embeddings", 32_768)))


def model_digest(folder: Path) -> str:
    """SHA-256 of the configuration and every weight, shortened."""
    whole = hashlib.sha256()
    kinds = ("*.json", "*.jinja", "*.safetensors")  # pixel limits and template too
    for path in sorted(path for kind in kinds for path in folder.glob(kind)):
        with open(path, "rb") as file:
            whole.update(path.name.encode())
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def messages_of(question: Question, benchmark: Benchmark, style: str) -> tuple[list[dict], str]:
    """The request's messages, and a digest of what they say and show."""
    content: list[dict[str, Any]] = []
    said = hashlib.sha256()
    for part in prompt_parts(question, benchmark.adapter, style):
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            said.update(b"text" + part.encode())
        else:
            image = question.images[part]
            said.update(b"image" + image.digest.encode())
            kind = "png" if image.data.startswith(b"\x89PNG") else "jpeg"
            encoded = base64.b64encode(image.data).decode()
            content.append(
                {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded}"}}
            )
    texts_alone = all(part["type"] == "text" for part in content)
    whole: Any = "".join(part["text"] for part in content) if texts_alone else content
    return [{"role": "user", "content": whole}], said.hexdigest()[:16]


def generate(
    benchmark: Benchmark,
    endpoint: Endpoint,
    client: Client,
    protocol: Protocol,
    *,
    output: Path,
    limit: int,
    parallel: int,
    timeout_s: float,
) -> list[ResponseRecord]:
    """Every response of a benchmark; those that the folder holds are not asked for again.

    Args:
        output: folder of the evaluation.
        limit: of questions; 0: none. Written into the manifest.
        parallel: requests at a time.
        timeout_s: of one response.

    Raises:
        EvaluationError: the folder holds responses of another protocol, model or files.
        ServerFailed: a request was refused, or failed three times.
    """
    adapter, own = benchmark.adapter, protocol.of(benchmark.adapter)
    path = output / "responses" / f"{adapter.name}.jsonl"
    check_manifest(
        path.with_suffix(".json"),
        {
            "protocol": protocol.digest(adapter),
            "settings": protocol.as_dict(adapter)["protocol"],
            "model": endpoint.identity,
            "limit": limit,
            "files": {file.name: digest_of(file) for file in benchmark.files},
            "adapter": protocol.as_dict(adapter)["adapter"],
        },
    )
    done = {record.key: record for record in read_records(path, ResponseRecord)}
    wanted = [(q, number) for q in benchmark.questions for number in range(own.samples)]
    missing = [(q, number) for q, number in wanted if (q.id, number) not in done]
    if missing:
        appender = Appender(path)
        try:
            with tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=adapter.name,
                      leave=False, disable=None) as bar:  # fmt: skip

                def keep(record: ResponseRecord) -> None:
                    appender.add(record)
                    done[record.key] = record
                    bar.update()

                client.run(
                    _ask_all(benchmark, missing, endpoint, client, own, keep, parallel, timeout_s)
                )
        finally:
            appender.close()
    records = [done[q.id, number] for q, number in wanted]
    write_records(path, records)
    return records


def digest_of(path: Path) -> str:
    """SHA-256 of a file, shortened."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


async def _ask_all(
    benchmark: Benchmark,
    missing: List[tuple[Question, int]],
    endpoint: Endpoint,
    client: Client,
    protocol: Protocol,
    keep: Any,
    parallel: int,
    timeout_s: float,
) -> None:
    """A request a response, in the order of the questions, ``parallel`` at a time; the first that
    fails ends the others."""
    room = asyncio.Semaphore(parallel)

    async def one(question: Question, number: int) -> None:
        async with room:
            messages, digest = messages_of(question, benchmark, protocol.style)
            seed = sample_seed(benchmark.adapter, question, number, seed=protocol.seed)
            body = {
                "model": endpoint.model,
                "messages": messages,
                "temperature": protocol.temperature,
                "top_p": protocol.top_p,
                "seed": seed % 2**63,
                "max_tokens": protocol.max_tokens,
            }
            if endpoint.vllm:  # or a model folder's generation_config.json has its way
                body |= {"repetition_penalty": 1.0, "top_k": 0}
            answer = await _answer(client, endpoint, body, timeout_s, question)
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            keep(
                ResponseRecord(
                    question=question.id,
                    sample=number,
                    seed=seed,
                    prompt_sha256=digest,
                    order=question.order,
                    response=choice["message"].get("content") or "",
                    finish_reason=choice.get("finish_reason") or "",
                    prompt_tokens=int(usage.get("prompt_tokens", 0)),
                    response_tokens=int(usage.get("completion_tokens", 0)),
                )
            )

    async with asyncio.TaskGroup() as group:
        for question, number in missing:
            group.create_task(one(question, number))


async def _answer(
    client: Client, endpoint: Endpoint, body: dict, timeout_s: float, question: Question
) -> dict[str, Any]:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            found = await client.ask(
                endpoint.address, "POST", "v1/chat/completions", body, timeout_s=timeout_s
            )
            found["choices"][0]["message"]
        except RequestRefused as error:
            if "status 429" not in str(error) or attempt == ATTEMPTS:
                raise RequestRefused(
                    f"question {question.id}: {error}; if it is the length, use --max-tokens"
                ) from error
            await asyncio.sleep(10.0 * attempt)
        except ServerFailed:
            if attempt == ATTEMPTS:
                raise
        except (KeyError, IndexError, TypeError) as error:
            raise EvaluationError(
                f"{endpoint.address}: the answer to question {question.id} has no message "
                f"({error!r}); is it an OpenAI-compatible server?"
            ) from error
        else:
            return found
        await asyncio.sleep(attempt)
    raise AssertionError("unreachable")
