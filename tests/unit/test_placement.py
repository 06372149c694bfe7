"""Which GPUs servers get, and when colocated ones sleep and wake: the calls, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ovr_fast.config import RolloutConfig, load_config
from ovr_fast.records import ImageLimits
from ovr_fast.rollout.fleet import Fleet
from ovr_fast.rollout.placement import Placement, check_placement, server_devices
from ovr_fast.settings import ConfigError
from support.toy_run import ROOT


@pytest.fixture
def calls() -> Iterator[tuple[str, list[str]]]:
    """A server that only remembers what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # /health
            self.send_response(200)
            self.end_headers()

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
    thread.join(timeout=10)


def fleet(calls: tuple[str, list[str]], *, sleeps: bool, barriers: list[int]) -> Fleet:
    """With a mesh that notes after how many calls its ranks met."""
    url, asked = calls
    config = load_config(
        ROOT / "configs" / "tiny.toml", ["rollout.servers=0", f'rollout.urls=["{url}"]']
    )
    mesh = SimpleNamespace(
        rank=0,
        device=torch.device("cpu"),
        on_first_rank=lambda work, otherwise: work(),
        barrier=lambda: barriers.append(len(asked)),
    )
    made = Fleet(
        config, shape=None, chat=None, mesh=mesh, weights=Path(), log_folder=Path(),
        images=ImageLimits(count=0, width=0, height=0),
    )  # type: ignore[arg-type]  # fmt: skip
    made.placement = Placement(transfer_backend="gloo", sleeps=sleeps)
    return made


def test_servers_sleep_once_and_wake_in_two_parts(calls: tuple[str, list[str]]) -> None:
    _, asked = calls
    barriers: list[int] = []
    shared = fleet(calls, sleeps=True, barriers=barriers)
    shared.sleep()
    shared.sleep()
    shared._wake({"weights"})  # as for a weight sync
    shared._wake({"weights", "kv_cache"})  # as for generation
    shared._wake({"weights", "kv_cache"})
    assert asked == ["/sleep?level=1", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"]
    assert barriers == [1, 2]  # before each wake: no rank's memory is still to be freed
    shared.sleep()
    shared._wake({"weights"})
    shared.sleep()  # with the keys and values asleep the weights still go
    assert asked[3:] == ["/sleep?level=1", "/wake_up?tags=weights", "/sleep?level=1"]


def test_servers_of_their_own_never_sleep(calls: tuple[str, list[str]]) -> None:
    _, asked = calls
    alone = fleet(calls, sleeps=False, barriers=[])
    alone.sleep()
    alone._wake({"weights", "kv_cache"})
    assert asked == []


@pytest.mark.parametrize(
    ("placement", "on_gpu", "expected"),
    [
        ("disaggregated", True, Placement(transfer_backend="nccl", sleeps=False)),
        ("colocated", True, Placement(transfer_backend="ipc", sleeps=True)),
        ("colocated", False, Placement(transfer_backend="gloo", sleeps=False)),
    ],
)
def test_transport_and_sleep_follow_from_the_placement(
    placement: str, on_gpu: bool, expected: Placement
) -> None:
    assert Placement.of(RolloutConfig(placement=placement), on_gpu=on_gpu) == expected


def test_servers_get_the_gpus_after_the_trainer_s_or_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert server_devices(1, tensor=2, colocated=False) == "6,7"
    assert server_devices(1, tensor=2, colocated=True) == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a,b,c,d,e,f")
    assert server_devices(0, tensor=2, colocated=False) == "e,f"
    with pytest.raises(ConfigError, match="server 1 needs GPU number 7"):
        server_devices(1, tensor=2, colocated=False)


def test_colocated_servers_cover_the_trainer_s_gpus() -> None:
    more = ["rollout.placement=colocated", "rollout.servers=2", "rollout.tensor=2"]
    stays = load_config(ROOT / "configs" / "tiny.toml", more)
    with pytest.raises(ConfigError, match=r"needs parallel\.offload=model: with 'none'"):
        check_placement(stays, world=4, local_world=4, on_gpu=True)
    config = load_config(ROOT / "configs" / "tiny.toml", [*more, "parallel.offload=model"])
    check_placement(config, world=4, local_world=4, on_gpu=True)
    check_placement(config, world=1, local_world=1, on_gpu=False)
    with pytest.raises(ConfigError, match="each of the trainer's 8 GPUs.* is 4"):
        check_placement(config, world=8, local_world=8, on_gpu=True)
    with pytest.raises(ConfigError, match="for one node"):
        check_placement(config, world=8, local_world=4, on_gpu=True)
