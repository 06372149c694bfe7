"""Weights that go wrong between the trainer and a real server: each is found at that sync."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ovr_fast.config import load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.learner.passes import FrozenModel
from ovr_fast.recipe.build import build_whole
from ovr_fast.records import ImageLimits
from ovr_fast.rollout import weight_sync
from ovr_fast.rollout.canary import StaleWeights
from ovr_fast.rollout.client import ServerFailed
from ovr_fast.rollout.fleet import Fleet
from ovr_fast.rollout.weight_sync import MegatronWeights
from ovr_fast.shape.model_shape import read_shape
from support.image_run import lone_mesh
from support.served import ServedNode
from support.toy_run import BASE_MODEL, ROOT

pytestmark = pytest.mark.slow

Stream = list[tuple[str, Tensor]]


def stale(stream: Stream, rng: random.Random) -> str:
    """One tensor of other weights."""
    place = rng.randrange(len(stream))
    name, tensor = stream[place]
    stream[place] = (name, tensor * 1.001 + 1e-6)
    return name


def flipped(stream: Stream, rng: random.Random) -> str:
    """One bit."""
    place = rng.randrange(len(stream))
    name, tensor = stream[place]
    flat = tensor.clone().view(-1)
    bits = flat.view(torch.int32)
    bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(31)
    stream[place] = (name, flat.view(tensor.shape))
    return name


def swapped(stream: Stream, rng: random.Random) -> str:
    """Two tensors of one shape under each other's names."""
    while True:
        i, j = rng.sample(range(len(stream)), 2)
        (one, a), (other, b) = stream[i], stream[j]
        if a.shape == b.shape and not torch.equal(a, b):
            stream[i], stream[j] = (one, b), (other, a)
            return one


def missing(stream: Stream, rng: random.Random) -> str:
    """One is not sent."""
    return stream.pop(rng.randrange(len(stream)))[0]


def out_of_order(stream: Stream, rng: random.Random) -> str:
    """Two come in each other's place, under their own names."""
    i = rng.randrange(len(stream) - 1)
    stream[i], stream[i + 1] = stream[i + 1], stream[i]
    return stream[i + 1][0]


def another_dtype(stream: Stream, rng: random.Random) -> str:
    """One is in half precision."""
    place = rng.randrange(len(stream))
    name, tensor = stream[place]
    stream[place] = (name, tensor.bfloat16())
    return name


FAULTS = (stale, flipped, swapped, missing, out_of_order, another_dtype)


@pytest.fixture(scope="module")
def pair(running_server: ServedNode, tmp_path_factory) -> Iterator[tuple[Fleet, FrozenModel]]:
    """A fleet of the running server, and a model whose weights it gets."""
    running_server.wait()
    fleet = fleet_of(running_server, "rollout.verify_weights_every=1")
    model = build_whole(fleet.config, fleet.shape, fleet.mesh, fleet.chat, weights=BASE_MODEL)
    fleet.sync(model, version=0)
    yield fleet, model
    fleet.close()


def fleet_of(server: ServedNode, *overrides: str) -> Fleet:
    """A trainer's, that was given the server by URL."""
    config = load_config(
        ROOT / "configs" / "tiny.toml",
        ["rollout.servers=0", f'rollout.urls=["{server.address}"]', "rl.max_response_tokens=40",
         "rl.context_tokens=[]", "rl.context_steps=[]", *overrides],
    )  # fmt: skip
    shape = read_shape(BASE_MODEL)
    return Fleet(
        config,
        shape=shape,
        chat=ChatTemplate(BASE_MODEL, image_token_id=shape.image_token_id),
        mesh=lone_mesh(),
        weights=BASE_MODEL,
        log_folder=Path(),
        images=ImageLimits(count=1, width=84, height=84),
    )


def sync_with(
    fleet: Fleet,
    model: FrozenModel,
    plant: Callable[[Stream], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = MegatronWeights.__iter__

    def planted(self: MegatronWeights) -> Iterator[tuple[str, Tensor]]:
        stream = [(name, tensor.clone()) for name, tensor in whole(self)]
        plant(stream)
        return iter(stream)

    with monkeypatch.context() as patch:
        patch.setattr(MegatronWeights, "__iter__", planted)
        fleet.sync(model, version=1)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_at_the_engine_s_door_is_named(
    fault: Callable, pair: tuple[Fleet, FrozenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OVR_FAULTS=17 plants 102 of them."""
    fleet, model = pair
    for turn in range(int(os.environ.get("OVR_FAULTS", "1"))):
        rng, names = random.Random(f"{fault.__name__}{turn}"), []

        def plant(stream: Stream, rng=rng, names=names) -> None:
            names.append(fault(stream, rng))

        with pytest.raises(ServerFailed) as caught:
            sync_with(fleet, model, plant, monkeypatch)
        assert names[0] in str(caught.value), (names, caught.value)
        fleet.delivery.forget_group()  # as a run that ends and comes back
        gc.collect()
    fleet.sync(model, version=0)


def test_a_checksum_sees_what_was_changed_on_the_way(
    pair: tuple[Fleet, FrozenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a transport that compares nothing itself, at a sync that
    ``rollout.verify_weights_every`` names: less than the canary would see."""
    fleet, model = pair

    def change(stream: Stream) -> None:
        place = next(i for i, (n, _) in enumerate(stream) if n.endswith("0.input_layernorm.weight"))
        name, tensor = stream[place]
        stream[place] = (name, tensor * (1 + 1e-6))

    fleet.sync(model, version=0)
    assert fleet.delivery._sync is not None
    fleet.delivery._sync._source.digested = False
    fleet.delivery._sync._source.digests.clear()
    wrong = r"not have the weights of step 1 that it was sent: .*0\.input_layernorm\.weight differ"
    with pytest.raises(StaleWeights, match=wrong):
        sync_with(fleet, model, change, monkeypatch)
    fleet.delivery.forget_group()
    fleet.sync(model, version=0)


def test_the_canary_sees_what_no_checksum_was_asked_for(
    pair: tuple[Fleet, FrozenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of one matrix moved by one: every eighth of them (all are seen)."""
    fleet, model = pair

    def plant(place: int) -> Callable[[Stream], None]:
        def change(stream: Stream) -> None:
            name, tensor = stream[place]
            stream[place] = (name, tensor.roll(1, 0))

        return change

    source = MegatronWeights(everywhere=False)
    source.model = model.model
    matrices = [place for place, (_, tensor) in enumerate(source) if tensor.ndim > 1]
    assert len(matrices) > 30
    without = replace(fleet.delivery.rollout, verify_weights_every=0)
    monkeypatch.setattr(fleet.delivery, "rollout", without)
    fleet.sync(model, version=0)
    assert fleet.delivery._sync is not None
    fleet.delivery._sync._source.digested = False
    fleet.delivery._sync._source.digests.clear()
    for place in matrices[::8]:
        with pytest.raises(StaleWeights, match="log-probs of a fixed prompt"):
            sync_with(fleet, model, plant(place), monkeypatch)
    fleet.sync(model, version=0)


@pytest.mark.parametrize(
    "fault", [missing, out_of_order, another_dtype], ids=lambda fault: fault.__name__
)
def test_a_stream_that_is_not_what_was_declared_is_named_before_it_is_sent(
    fault: Callable, pair: tuple[Fleet, FrozenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over CUDA IPC, where vLLM trusts it."""
    source = MegatronWeights(everywhere=False, compared=True)
    source.model = pair[1].model
    assert len(list(source)) == len(source.metadata())
    stream = list(MegatronWeights.__iter__(source))
    name = fault(stream, random.Random(1))
    monkeypatch.setattr(weight_sync, "export_hf", lambda *_, **__: iter(stream))
    with pytest.raises(ValueError, match="weight sync: declared.*but the stream gave") as caught:
        list(source)
    assert name in str(caught.value)


def test_a_failure_over_cuda_ipc_waits_for_the_last_chunk() -> None:
    """Where the ranks meet after each; nothing more is posted."""
    posted: list[str] = []

    class Failing:
        def post_all(self, addresses, path, bodies, *, timeout_s, answered) -> list[dict]:
            posted.append(path)
            if posted.count("update_weights") == 2:
                raise ServerFailed("gone")
            return [{}]

    for patient in (True, False):
        posted.clear()
        servers = weight_sync._Fanout(Failing(), (None,), 1, 5.0, patient=patient)  # type: ignore[arg-type]
        servers.start_weight_update()
        servers.update_weights({})
        if not patient:
            with pytest.raises(ServerFailed, match="gone"):
                servers.update_weights({})
            continue
        for _ in range(3):
            servers.update_weights({})
        servers.finish_weight_update()
        assert str(servers.failure) == "gone"
        assert posted == ["start_weight_update", "update_weights", "update_weights"]


def test_a_server_of_another_model_is_refused_before_the_first_byte(
    pair: tuple[Fleet, FrozenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trainer would send is one matrix wider, one in half precision and one short."""
    fleet, model = pair
    whole, begun = weight_sync.declared, []

    def other(*arguments, **options) -> list:
        rows = whole(*arguments, **options)
        matrix = next(i for i, row in enumerate(rows) if row.name.endswith("down_proj.weight"))
        rows[matrix] = replace(rows[matrix], shape=(rows[matrix].shape[0], 7))
        rows[-2] = replace(rows[-2], dtype=torch.bfloat16)
        return rows[:-1]

    fleet.delivery.forget_group()
    with monkeypatch.context() as patch:
        patch.setattr(weight_sync, "declared", other)
        patch.setattr(weight_sync._Fanout, "start_weight_update", lambda self: begun.append(1))
        with pytest.raises(
            ServerFailed,
            match=r"holds other weights than this run's model: .*is float32 \[.*\] there and "
            r"(bfloat16 \[|missing here).*; start it with",
        ):
            fleet.sync(model, version=1)
    assert not begun
    fleet.delivery.forget_group()
    fleet.sync(model, version=0)


def test_a_server_that_hangs_inside_a_sync_ends_it_and_can_be_used_again(
    pair: tuple[Fleet, FrozenModel],
    running_server: ServedNode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every process of it is frozen when the first weight is to be sent; it thaws when that trainer
    has given it up, in the middle of an update, and serves the next."""
    fleet, model = pair
    fleet.delivery.forget_group()
    hanging = fleet_of(running_server, "rollout.sync_timeout_s=10", "rollout.patience_s=2")

    def send(number: int) -> None:
        for process in running_server.server_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    try:
        began = time.monotonic()
        with pytest.raises(ServerFailed, match=r"no server was left for rollout.patience_s=2 s"):
            sync_with(hanging, model, lambda stream: send(signal.SIGSTOP), monkeypatch)
        assert time.monotonic() - began < 10 + weight_sync.GRACE_S
    finally:
        send(signal.SIGCONT)
        hanging.close()
    fleet.sync(model, version=0)
