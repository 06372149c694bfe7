"""When a colocated engine sleeps and wakes: the calls it makes, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from ovr_fast.config import load_config
from ovr_fast.rollout.engine import RolloutEngine


@pytest.fixture
def calls() -> Iterator[tuple[str, list[str]]]:
    """A server that only remembers what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()


def engine(url: str, *, sleeps: bool) -> RolloutEngine:
    config = load_config(
        ROOT / "configs" / "tiny.toml", ["rollout.servers=0", f'rollout.urls=["{url}"]']
    )
    mesh = SimpleNamespace(rank=0, device=torch.device("cpu"), from_first=lambda value: value)
    made = RolloutEngine(
        config, shape=None, encoder=None, mesh=mesh, model_folder=Path(), log_folder=Path()
    )  # type: ignore[arg-type]
    made.sleeps = sleeps
    return made


def test_an_engine_sleeps_once_and_wakes_in_two_parts(calls: tuple[str, list[str]]) -> None:
    url, asked = calls
    shared = engine(url, sleeps=True)
    shared.sleep()
    shared.sleep()
    shared._wake({"weights"})  # as for a weight sync
    shared._wake({"weights", "kv_cache"})  # as for generation
    shared._wake({"weights", "kv_cache"})
    assert asked == ["/sleep?level=1", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"]
    shared.sleep()
    shared._wake({"weights"})
    shared.sleep()  # with the keys and values asleep the weights still go
    assert asked[3:] == ["/sleep?level=1", "/wake_up?tags=weights", "/sleep?level=1"]


def test_an_engine_of_its_own_never_sleeps(calls: tuple[str, list[str]]) -> None:
    url, asked = calls
    alone = engine(url, sleeps=False)
    alone.sleep()
    alone._wake({"weights", "kv_cache"})
    assert asked == []
