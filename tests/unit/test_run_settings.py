"""Settings of servers, evaluation and the run folder change what they say they change."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch

from ovr_fast.config import Config, RolloutConfig, load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.evaluation.heldout import HeldOut
from ovr_fast.records import ImageLimits, Prompt, RolloutBatch
from ovr_fast.rollout.client import post_completion
from ovr_fast.rollout.fleet import Fleet
from ovr_fast.rollout.placement import Placement
from ovr_fast.rollout.protocol import PromptMismatch, request_body, request_seed
from ovr_fast.rollout.server import Server, ServerFailed, ServerOptions
from ovr_fast.run.folder import RunFolder
from ovr_fast.run.run import Run
from ovr_fast.shape.model_shape import read_shape
from support.image_run import a_rollout
from support.toy_run import BASE_MODEL, ROOT

MESSAGES = ({"role": "user", "content": "Hi"},)
PROMPT = Prompt(id="p", data_source="s", messages=MESSAGES, images=(), answer="1", response=None)


def config(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "tiny.toml", list(overrides))


def body(**rollout) -> dict:
    shape = SimpleNamespace(image_token_id=5, video_token_id=6)
    settings = RolloutConfig(**rollout)
    return request_body(PROMPT, settings, shape, seed=3, samples=2, max_tokens=9)  # type: ignore[arg-type]


def test_a_request_carries_the_sampling_settings() -> None:
    asked = body(temperature=0.7, top_p=0.9, stop=("END",))
    assert (asked["temperature"], asked["top_p"], asked["stop"]) == (0.7, 0.9, ["END"])
    assert (asked["seed"], asked["n"], asked["max_completion_tokens"]) == (3, 2, 9)
    assert asked["logit_bias"] == {"5": -100.0, "6": -100.0}
    assert "stop" not in body()
    assert len({request_seed(run, step, 0) for run in (0, 1) for step in (0, 1, 2)}) == 6


def options(*overrides: str, sleeps: bool = False, backend: str = "gloo") -> ServerOptions:
    placement = Placement(transfer_backend=backend, sleeps=sleeps)
    images = ImageLimits(count=2, width=84, height=56)
    return ServerOptions.of(config(*overrides), placement, model=Path("m"), images=images)


def test_a_server_is_started_with_the_settings() -> None:
    more = ["rollout.tensor=2", "rollout.gpu_memory_utilization=0.5", "rollout.kv_cache_gib=3"]
    made = options(*more, "run.seed=7", "rollout.compile=false", "model.dtype=bfloat16")
    words = made.command(host="127.0.0.1", port=8000)

    def after(flag: str) -> str:
        return words[words.index(flag) + 1]

    assert after("--tensor-parallel-size") == "2"
    assert after("--gpu-memory-utilization") == "0.5"
    assert after("--seed") == "7"
    assert after("--dtype") == "bfloat16"
    assert after("--max-model-len") == str(192 + 96)
    assert json.loads(after("--limit-mm-per-prompt")) == {
        "image": {"count": 2, "width": 84, "height": 56}, "video": {"count": 0},
    }  # fmt: skip
    assert "--enforce-eager" in words
    assert "--enable-sleep-mode" not in words
    environment = made.environment(devices="4,5")
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    plain = options(sleeps=True, backend="ipc").command(host="127.0.0.1", port=1)
    assert "--enforce-eager" not in plain
    assert "--enable-sleep-mode" in plain
    assert "--no-enable-chunked-prefill" not in plain


class Idle(ServerOptions):
    """A process that is no server."""

    def command(self, *, host: str, port: int) -> list[str]:
        return [sys.executable, "-c", "import time; print('compiling', flush=True); time.sleep(60)"]


class Busy(ServerOptions):
    """A process that works and never answers."""

    def command(self, *, host: str, port: int) -> list[str]:
        return [sys.executable, "-c", "while True: pass"]


@pytest.mark.parametrize(
    ("kind", "patience", "message"), [(Idle, 30.0, "was silent for"), (Busy, 1.5, "did not end")]
)
def test_a_start_is_given_up_on_silence_or_at_the_limit(
    kind: type[ServerOptions],
    patience: float,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ovr_fast.rollout.server.PATIENCE", patience)
    fields = {name: getattr(options(), name) for name in ServerOptions.__slots__}
    server = Server(kind(**fields), log=tmp_path / "log", devices=None)
    began = time.monotonic()
    with pytest.raises(ServerFailed, match=rf"{message}.*startup_timeout_s=2\).*{tmp_path}"):
        server.wait_until_ready(2.0)
    assert 2.0 < time.monotonic() - began < 30
    assert server.process.poll() is not None


@pytest.fixture
def slow_server() -> Iterator[tuple[str, list[int]]]:
    """Takes 0.2 s for an answer, and counts how many it is asked for at a time."""
    counts = [0, 0]  # now, most
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # /health
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                counts[0] += 1
                counts[1] = max(counts)
            time.sleep(0.2)
            with lock:
                counts[0] -= 1
            content = json.dumps({"prompt_token_ids": [1], "choices": []}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", counts
    server.shutdown()
    thread.join()


def fleet(url: str, *overrides: str) -> Fleet:
    settings = config("rollout.servers=0", f'rollout.urls=["{url}"]', *overrides)
    mesh = SimpleNamespace(
        rank=0, device=torch.device("cpu"), on_first_rank=lambda work, otherwise: work()
    )
    shape = read_shape(BASE_MODEL)
    chat = ChatTemplate(BASE_MODEL, image_token_id=shape.image_token_id)
    return Fleet(
        settings, shape=shape, chat=chat, mesh=mesh, weights=Path(), log_folder=Path(),
        images=ImageLimits(count=0, width=0, height=0),
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_prompts_in_flight_than_the_setting(
    most: int, slow_server: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, counts = slow_server
    monkeypatch.setattr("ovr_fast.rollout.fleet.parse_responses", lambda *_, **__: [])
    asked = fleet(url, f"rollout.max_in_flight={most}")
    assert asked.generate((PROMPT,) * 6, step=1, samples=1, max_tokens=4) == []
    assert counts[1] == most


def test_a_server_that_saw_another_prompt_is_named(slow_server: tuple[str, list[int]]) -> None:
    with pytest.raises(PromptMismatch, match="prompt p: the server saw 1 tokens with 0 visual"):
        fleet(slow_server[0]).generate((PROMPT,), step=1, samples=1, max_tokens=4)


def test_a_request_has_its_time(slow_server: tuple[str, list[int]]) -> None:
    async def ask(timeout_s: float) -> dict:
        async with httpx.AsyncClient(timeout=httpx.Timeout(timeout_s)) as client:
            return await post_completion(client, slow_server[0], {})

    assert asyncio.run(ask(5.0))["choices"] == []
    with pytest.raises(ServerFailed, match="did not answer within rollout.request_timeout_s=0 s"):
        asyncio.run(ask(0.05))
    late = fleet(slow_server[0], "rollout.request_timeout_s=0.05")
    with pytest.raises(ServerFailed, match="request_timeout_s"):
        late.generate((PROMPT,), step=1, samples=1, max_tokens=4)


def test_weights_are_sent_from_the_trainer_s_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovr_fast.rollout import weight_sync

    told = []
    factory = weight_sync.WeightTransferTrainerFactory
    monkeypatch.setattr(factory, "trainer_init", lambda info, **_: told.append(info))
    mesh = SimpleNamespace(rank=0)
    weight_sync.WeightSync(
        mesh, urls=("http://a", "http://b"), workers=2, address="10.0.0.7", backend="gloo",
        timeout_s=1.0,
    )  # type: ignore[arg-type]  # fmt: skip
    (info,) = told
    assert (info.master_address, info.world_size) == ("10.0.0.7", 5)


def test_evaluations_are_due_every_so_many_steps_and_at_the_end() -> None:
    def due(every: int) -> list[int]:
        held_out = HeldOut(
            {}, fleet=SimpleNamespace(sleep=lambda: None), verifier=None, mesh=None,
            max_tokens=1, every=every,
        )  # type: ignore[arg-type]  # fmt: skip
        held_out.measure = lambda: {"x": 1.0}  # type: ignore[method-assign]
        return [step for step in range(1, 8) if held_out.measure_if_due(step, last=7)]

    assert due(3) == [3, 6, 7]
    assert due(0) == [7]


def test_exports_and_checkpoints_are_due_every_so_many_steps() -> None:
    def due(method: str, *overrides: str) -> list[int]:
        made: list[str] = []
        run = SimpleNamespace(
            config=config(*overrides), last_step=7, export=lambda learner, name: made.append(name)
        )
        if method == "export":
            for step in range(1, 8):
                Run.export_if_due(run, step, None)  # type: ignore[arg-type]
            return [int(name.removeprefix("hf_")) for name in made]
        return [step for step in range(1, 8) if Run.save_is_due(run, step)]  # type: ignore[arg-type]

    assert due("export", "run.export_every=3") == [3, 6]
    assert due("export") == []
    assert due("save", "run.save_every=5") == [5, 7]


def test_readable_rollouts_and_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict] = []
    board = SimpleNamespace(log=shown.append, finish=lambda: shown.append({"finished": True}))
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **options: shown.append(options) or board)
    )
    tokens = torch.arange(3).numpy()
    rollouts = tuple(a_rollout(0, sample, tokens, tokens, reward=1.0) for sample in range(6))
    batch = RolloutBatch(step=2, prompts=(PROMPT,), rollouts=rollouts)
    folder = RunFolder(tmp_path / "run", config("run.wandb=true", "run.name=a"))
    for count in (0, 2):
        settings = config(f"run.readable_rollouts={count}")
        run = SimpleNamespace(log=folder, config=settings, recipe_stage="rl")
        Run.record_rollouts(run, 2, batch)  # type: ignore[arg-type]
    row = {"rollout/reward": 0.5, "rollout/length_tokens": 3.0, "critic/explained_variance": 0.0}
    folder.record("rl", 2, row)
    folder.close()
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 2]
    assert shown[0]["name"] == "a"
    assert shown[1:] == [{f"rl/{key}": value for key, value in row.items()}, {"finished": True}]
    described = (tmp_path / "run" / "config.toml").read_text()
    assert "# Discount per token, 0..1. OVR. (at least 0 and at most 1)" in described
    assert os.path.getsize(tmp_path / "run" / "curves.png") > 0
