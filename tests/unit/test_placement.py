"""Which GPUs servers get, and how weights reach them."""

from __future__ import annotations

import pytest
import torch

from ovr_fast.config import RolloutConfig, load_config
from ovr_fast.rollout.placement import Placement, check_placement, server_devices
from ovr_fast.settings import ConfigError
from support.toy_run import ROOT


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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert server_devices(1, tensor=2, colocated=False) == "6,7"
    assert server_devices(1, tensor=2, colocated=True) == "2,3"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert server_devices(1, tensor=2, colocated=False) == "6,7"
    with pytest.raises(ConfigError, match="server 2 needs GPU number 9, .* this node has 8: lower"):
        server_devices(2, tensor=2, colocated=False)
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
    ahead = load_config(
        ROOT / "configs" / "tiny.toml",
        [*more, "parallel.offload=model", "rollout.max_staleness=1"],
    )
    with pytest.raises(ConfigError, match=r"set rollout\.partial=true"):
        check_placement(ahead, world=4, local_world=4, on_gpu=True)
    with pytest.raises(ConfigError, match="each of the trainer's 8 GPUs.* is 4"):
        check_placement(config, world=8, local_world=8, on_gpu=True)
    with pytest.raises(ConfigError, match="for one node"):
        check_placement(config, world=8, local_world=4, on_gpu=True)
