"""Ten million response tokens through the rollout client: what the trainer's process spends.

    python benchmarks/rollout_client.py [--tokens 10000000] [--length 10000] [--json FILE]

A server of its own, without a model, answers as fast as it is asked, in the form of vLLM's
generate route. Three ways to take the answers: ours; ours with every answer decoded in the
trainer's process; and a client that keeps whole answers and parses them as plain JSON. Ratios
within a run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from aiohttp import web

from ovr_fast.config import load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.records import Prompt
from ovr_fast.rollout import decoding as decoding_module
from ovr_fast.rollout.client import Address, Client
from ovr_fast.rollout.decoding import Decoding
from ovr_fast.rollout.health import Health
from ovr_fast.rollout.members import Member, State
from ovr_fast.rollout.protocol import GENERATE, RenderedPrompt, Sample, request_body
from ovr_fast.rollout.sampler import Sampler
from ovr_fast.shape.model_shape import read_shape
from stub_server import answer_of

ROOT = Path(__file__).parents[1]
BASE_MODEL = ROOT / "ovr_fast" / "toy" / "base_model"
LIVE = 64


def serve(path: str, length: int) -> None:
    """One canned response of ``length`` tokens to every request."""
    tokens = np.random.default_rng(0).integers(10, 400, length).tolist()
    body = {"request_id": "x", "token_ids": []}
    canned = json.dumps(answer_of(body, tokens, finish="length", version="0"))
    before, after = canned.split('"prompt_token_ids": []')

    async def generate(request: web.Request) -> web.Response:
        asked = (await request.json())["token_ids"]
        return web.Response(text=f'{before}"prompt_token_ids": {json.dumps(asked)}{after}')

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text="")

    app = web.Application(client_max_size=2**30)
    app.router.add_post(f"/{GENERATE}", generate)
    app.router.add_get("/metrics", metrics)
    web.run_app(app, path=path, print=None, access_log=None)


def samples(count: int, length: int) -> list[Sample]:
    """As many, of one prompt each eight."""
    shape = read_shape(BASE_MODEL)
    chat = ChatTemplate(BASE_MODEL, image_token_id=shape.image_token_id)
    messages = ({"role": "user", "content": "How many?"},)
    prompt = Prompt(id="p", data_source="s", messages=messages, images=(), answer="", response=None)
    made = []
    for index in range(count):
        if index % 8 == 0:
            asked = RenderedPrompt.of(prompt, index // 8, chat)
        made.append(Sample(asked=asked, step=1, number=index % 8, seed=index, max_tokens=length))
    return made


def ours(address: Address, made: list[Sample]) -> int:
    """The fleet's sampler."""
    rollout = load_config(ROOT / "configs" / "tiny.toml", [f"rollout.max_in_flight={LIVE}"]).rollout
    client = Client()
    decoding = Decoding(BASE_MODEL / "tokenizer.json")
    member = Member(number=0, address=address, launch=None, server=None, state=State.SERVING)
    health = Health(client, [member], rollout=rollout, sleeps=False, say=print)
    shape = read_shape(BASE_MODEL)
    sampler = Sampler(client, health, decoding=decoding, rollout=rollout, shape=shape)
    client.run(sampler.submit(made, first=False))
    client.run(sampler.until(lambda: all(sample.done for sample in made), can_give=False))
    responses = [sample.response(decoding.decoder, prompt_index=0) for sample in made]
    client.run(sampler.stop())
    client.close()
    return sum(len(response.response_tokens) for response in responses)


def decoded_here(address: Address, made: list[Sample]) -> int:
    """The same without processes that decode."""
    decoding_module.OWN_BYTES = 2**62
    return ours(address, made)


def plain_json(address: Address, made: list[Sample]) -> int:
    """Whole answers, parsed by ``json``."""
    rollout, shape = load_config(ROOT / "configs" / "tiny.toml", []).rollout, read_shape(BASE_MODEL)
    client = Client()
    chat = ChatTemplate(BASE_MODEL, image_token_id=shape.image_token_id)
    gate = asyncio.Semaphore(LIVE)

    async def one(sample: Sample) -> tuple[np.ndarray, np.ndarray, str]:
        async with gate:
            content = await client.fetch(
                address, "POST", GENERATE, request_body(sample, rollout, shape), timeout_s=None
            )
        choice = json.loads(content)["choices"][0]
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        tokens = np.asarray(choice["token_ids"], dtype=np.int64)
        return tokens, np.asarray(logprobs, dtype=np.float32), chat.decode(tokens)

    async def every() -> list:
        return await asyncio.gather(*(one(sample) for sample in made))

    found = client.run(every())
    client.close()
    return sum(len(tokens) for tokens, _, _ in found)


WAYS: tuple[Callable[[Address, list[Sample]], int], ...] = (ours, decoded_here, plain_json)


def measure(way: int, path: str, count: int, length: int, results: multiprocessing.Queue) -> None:
    """One way, in a process of its own."""
    made = samples(count, length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, own = time.perf_counter(), time.process_time()
    tokens = WAYS[way](Address(f"unix:{path}"), made)
    assert tokens == count * length
    results.put({
        "way": WAYS[way].__name__,
        "wall_s": time.perf_counter() - wall,
        "process_s": time.process_time() - own,
        "us_a_token": (time.process_time() - own) / tokens * 1e6,
        "memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "bytes_a_token_kept": 8 + 4,
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--length", type=int, default=10_000, help="of a response")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "socket")
        server = processes.Process(target=serve, args=(path, arguments.length), daemon=True)
        server.start()
        while not os.path.exists(path):
            time.sleep(0.1)
        count = arguments.tokens // arguments.length
        results = processes.Queue()
        for way in range(len(WAYS)):
            worker = processes.Process(
                target=measure, args=(way, path, count, arguments.length, results)
            )
            worker.start()
            rows.append(results.get())
            worker.join()
        server.terminate()
    print("| way | seconds of the trainer's process | us a token | wall | memory |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['way']} | {row['process_s']:.1f} | {row['us_a_token']:.2f} | "
            f"{row['wall_s']:.1f} s | {row['memory_mib']:,.0f} MiB |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
