"""The fleet beside stub servers: what is sent where, and what becomes of it when servers fail."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web

from ovr_fast import stopping
from ovr_fast.config import Config, load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.records import ImageLimits, Microbatch, Prompt
from ovr_fast.rollout import register as register_module
from ovr_fast.rollout import sampler, serve, weight_sync
from ovr_fast.rollout.canary import Canary, StaleWeights
from ovr_fast.rollout.client import (
    Address,
    Client,
    RequestRefused,
    ServerFailed,
    ServerSilent,
)
from ovr_fast.rollout.decoding import OWN_BYTES, Decoding
from ovr_fast.rollout.delivery import keys_of
from ovr_fast.rollout.fleet import Fleet
from ovr_fast.rollout.members import Counters, State
from ovr_fast.rollout.placement import Placement
from ovr_fast.rollout.protocol import PromptMismatch, request_body
from ovr_fast.rollout.register import register, registered, unregister
from ovr_fast.rollout.sources import VLLMRollouts
from ovr_fast.settings import ConfigError
from ovr_fast.shape.model_shape import read_shape
from ovr_fast.stopping import Stopped
from stub_server import StubServer, answer_of, tokens_of
from support.image_run import an_image
from support.toy_run import BASE_MODEL, ROOT

SHAPE = read_shape(BASE_MODEL)


def prompt(text: str = "Hi") -> Prompt:
    messages = ({"role": "user", "content": text},)
    return Prompt(id=text, data_source="s", messages=messages, images=(), answer="1", response=None)


PROMPTS = tuple(prompt(f"p{i}") for i in range(6))


class OneRank(SimpleNamespace):
    """The mesh of one process."""

    rank, tp = 0, 1
    device = torch.device("cpu")

    def on_first_rank(self, work, *, otherwise):
        return work()

    def from_first_rank(self, work):
        return work()

    def broadcast_object(self, value):
        return value

    def barrier(self) -> None:
        pass


@pytest.fixture
def start() -> Iterator[Callable[..., StubServer]]:
    """Makes stub servers, which end with the test."""
    made: list[StubServer] = []

    def one(**options) -> StubServer:
        made.append(StubServer(**options))
        return made[-1]

    yield one
    for server in made:
        server.stop()


@pytest.fixture
def fleet_of() -> Iterator[Callable[..., Fleet]]:
    """Makes fleets of servers that have weights already."""
    made: list[Fleet] = []

    def one(servers: list[StubServer] | list[str], *overrides: str) -> Fleet:
        urls = [s if isinstance(s, str) else str(s.address) for s in servers]
        listed = ", ".join(f'"{url}"' for url in urls)
        config: Config = load_config(
            ROOT / "configs" / "tiny.toml",
            ["rollout.servers=0", f"rollout.urls=[{listed}]", *overrides],
        )
        fleet = Fleet(
            config,
            shape=SHAPE,
            chat=ChatTemplate(BASE_MODEL, image_token_id=SHAPE.image_token_id),
            mesh=OneRank(),
            weights=Path(),
            images=ImageLimits(count=0, width=0, height=0),
            log_folder=Path(),
        )  # type: ignore[arg-type]
        made.append(fleet)
        fleet.wait_until_ready()
        fleet.client.run(fleet.sampler.serve(fleet.members))
        return fleet

    yield one
    for fleet in made:
        fleet.close()


def generate(fleet: Fleet, *, prompts=PROMPTS, samples: int = 3, max_tokens: int = 40) -> list:
    return fleet.generate(prompts, step=1, samples=samples, max_tokens=max_tokens)


def submitted(fleet: Fleet, *, prompts=PROMPTS, samples: int, max_tokens: int) -> list:
    made = fleet.samples_of(prompts, step=1, samples=samples, max_tokens=max_tokens)
    fleet.submit(made)
    return made


def test_each_sample_is_a_request_of_its_own_seed(start, fleet_of) -> None:
    server = start()
    fleet = fleet_of([server], "rollout.temperature=0.7", "rollout.top_p=0.9")
    responses = generate(fleet, prompts=PROMPTS[:2])
    assert [(r.prompt_index, r.sample_index) for r in responses] == [
        (i, j) for i in range(2) for j in range(3)
    ]
    seeds = [body["sampling_params"]["seed"] for body in server.bodies]
    assert len(set(seeds)) == 6
    assert sorted(seeds)[1] == sorted(seeds)[0] + 1
    for response in responses:
        body = next(b for b in server.bodies if b["request_id"].startswith(
            f"1-{response.prompt_index}-{response.sample_index}-"
        ))  # fmt: skip
        sampling = body["sampling_params"]
        assert body["token_ids"] == response.prompt_tokens.tolist()
        assert response.response_tokens.tolist() == tokens_of(sampling["seed"], 40)
        assert response.rollout_logprobs == pytest.approx(-1 - response.response_tokens / 1024)
        assert response.text == fleet.decoding.decoder.text(response.response_tokens.tolist())
        assert (sampling["temperature"], sampling["top_p"], sampling["max_tokens"]) == (
            0.7,
            0.9,
            40,
        )
        assert sampling["logit_bias"] == {
            str(SHAPE.image_token_id): -100.0, str(SHAPE.video_token_id): -100.0,
        }  # fmt: skip
        assert (response.first_policy_version, response.finish_reason) == (0, "stop")
    assert "stop" not in server.bodies[0]["sampling_params"]


def test_an_image_goes_once_with_a_name_of_its_own(fleet_of, start) -> None:
    """Beside one placeholder in the ids; the server knows it again by the hash of its bytes."""
    fleet, image = fleet_of([start()]), an_image(0)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    asked = Prompt(
        id="p", data_source="", messages=({"role": "user", "content": content},), images=(image,),
        answer="", response=None,
    )  # fmt: skip
    one, other = fleet.samples_of((asked,), step=1, samples=2, max_tokens=5)
    bodies = [request_body(s, fleet.config.rollout, SHAPE) for s in (one, other)]
    assert bodies[0]["token_ids"].count(SHAPE.image_token_id) == 1
    assert one.asked.expanded.tolist().count(SHAPE.image_token_id) > 1
    for body in bodies:
        (part,) = body["content_parts"]
        assert part["uuid"] == image.digest == hashlib.sha256(image.data).hexdigest()
        kind, _, coded = part["url"].partition(",")
        assert (kind, base64.b64decode(coded)) == ("data:image/png;base64", image.data)
    assert "content_parts" not in request_body(
        fleet.samples_of(PROMPTS[:1], step=1, samples=1, max_tokens=5)[0],
        fleet.config.rollout, SHAPE,
    )  # fmt: skip


def test_stop_strings_are_sent(start, fleet_of) -> None:
    server = start()
    generate(fleet_of([server], 'rollout.stop=["END"]'))
    assert server.bodies[0]["sampling_params"]["stop"] == ["END"]
    assert server.bodies[0]["sampling_params"]["detokenize"] is True


@pytest.mark.parametrize("most", [1, 4])
def test_no_more_responses_in_flight_than_the_setting(most: int, start, fleet_of) -> None:
    server = start(token_s=0.001)
    generate(fleet_of([server], f"rollout.max_in_flight={most}"))
    assert server.most == most


def test_no_more_in_flight_than_fit_into_keys_and_values(start, fleet_of) -> None:
    """2,000 tokens of keys and values hold about 20 responses of up to 160 tokens."""
    server = start(token_s=0.002, kv_tokens=2_000, mean=1000)
    fleet = fleet_of([server])
    deadline = time.monotonic() + 20
    while fleet.members[0].kv_tokens is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    generate(fleet, samples=10, max_tokens=160)
    assert 10 <= server.most <= 30


def test_samples_of_a_prompt_share_a_server(start, fleet_of) -> None:
    servers = [start(token_s=0.001), start(token_s=0.001)]
    generate(fleet_of(servers), samples=4)
    seen = [{body["token_ids"].__repr__() for body in server.bodies} for server in servers]
    assert seen[0].isdisjoint(seen[1])
    assert len(seen[0]) == len(seen[1]) == 3


def test_an_idle_server_helps_one_that_has_too_much(start, fleet_of) -> None:
    servers = [start(token_s=0.002, mean=100), start(token_s=0.002, mean=100)]
    fleet = fleet_of(servers, "rollout.max_in_flight=2")
    generate(fleet, prompts=PROMPTS[:1], samples=12)
    assert min(len(server.bodies) for server in servers) >= 4


FAULTS = {
    "an error": lambda body: web.Response(status=500, text="EngineDeadError"),
    "a broken off response": lambda body: web.json_response(
        answer_of(body, [11, 12], finish="abort", version="default")
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_other_servers_take_over_and_the_tokens_are_the_same(fault: str, start, fleet_of) -> None:
    calm = generate(fleet_of([start(), start()]))
    bad, good = start(token_s=0.001), start(token_s=0.001)
    bad.fault = FAULTS[fault]
    fleet = fleet_of([bad, good])
    responses = generate(fleet)
    for one, other in zip(calm, responses, strict=True):
        assert np.array_equal(one.response_tokens, other.response_tokens)
        assert np.array_equal(one.rollout_logprobs, other.rollout_logprobs)
    assert fleet.sampler._retries > 0


def test_a_server_with_other_weights_than_it_was_given_is_left_out(start, fleet_of) -> None:
    """Somebody started it anew, behind our back: what it samples is not used."""
    anew, good = start(), start()
    good.version = "3"
    fleet = fleet_of([anew, good])
    fleet.delivery.version = fleet.sampler.version = 3
    responses = generate(fleet)
    assert len(responses) == 18
    assert {span.version for response in responses for span in response.versions} == {3}
    why = "it sampled from the weights of step 0, and has been given those of step 3"
    assert fleet.members[0].why == why
    asked = fleet.sampler.ask_all(fleet.canary.sample(), fleet.members[:1], 3)
    with pytest.raises(ServerFailed, match=why):
        fleet.client.run(asked)


def test_a_server_that_goes_away_is_replaced_by_the_others(start, fleet_of) -> None:
    calm = generate(fleet_of([start()]), samples=8)
    going, staying = start(token_s=0.01), start(token_s=0.01)
    fleet = fleet_of([going, staying])
    asked = submitted(fleet, prompts=PROMPTS, samples=8, max_tokens=40)
    time.sleep(0.15)
    going.stop()
    fleet.wait(lambda: all(s.done for s in asked), asked, "x")
    for one, sample in zip(calm, asked, strict=True):
        assert one.response_tokens.tolist() == sample.pieces[0].tokens.tolist()
    assert fleet.members[0].state is State.FAILED


@pytest.mark.parametrize("how", ["silent", "stalled"])
def test_a_server_that_answers_no_more_has_failed(how: str, start, fleet_of) -> None:
    bad, good = start(token_s=0.001), start(token_s=0.001)
    fleet = fleet_of([bad, good], "rollout.probe_timeout_s=0.5", "rollout.stall_timeout_s=1")
    setattr(bad, how, True)
    responses = generate(fleet)
    assert len(responses) == 18
    told = {"silent": "did not answer within 0.5 s", "stalled": "no token for"}[how]
    assert told in fleet.members[0].why


def test_a_server_that_is_slow_to_answer_but_samples_is_kept(start, fleet_of) -> None:
    """A response may take longer than any limit while tokens are made."""
    server = start(token_s=0.2, mean=1000)
    fleet = fleet_of([server], "rollout.stall_timeout_s=2.1")
    responses = generate(fleet, prompts=PROMPTS[:1], samples=1, max_tokens=18)
    assert len(responses[0].response_tokens) == 18
    assert fleet.sampler._retries == 0


def test_without_a_server_the_run_waits_and_then_ends(start, fleet_of) -> None:
    server = start(token_s=0.01)
    fleet = fleet_of([server], "rollout.patience_s=1.5")
    asked = submitted(fleet, prompts=PROMPTS, samples=2, max_tokens=40)
    server.stop()
    began = time.monotonic()
    with pytest.raises(
        ServerFailed, match=r"no server was left for rollout.patience_s=1.5 s; .*http"
    ):
        fleet.wait(lambda: all(s.done for s in asked), asked, "x")
    assert 1.5 < time.monotonic() - began < 10


def test_a_server_that_comes_back_gets_weights_before_it_is_used(
    start, fleet_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(tmp_path / "socket")
    server = start(token_s=0.01, socket=place)
    fleet = fleet_of([server])
    given: list[int] = []

    def give(learner, keys) -> bool:
        again = fleet.members[0]
        assert again.state is State.READY
        assert not started[0].bodies  # nothing is asked of it before
        given.append(learner.name)
        fleet.delivery.settle(keys, None)
        return True

    monkeypatch.setattr(fleet.delivery, "give", give)
    learner = type("Learner", (), {"name": "actor"})()
    fleet._given = weakref.ref(learner)
    asked = submitted(fleet, prompts=PROMPTS, samples=2, max_tokens=40)
    time.sleep(0.1)
    server.stop()
    (tmp_path / "socket").unlink(missing_ok=True)
    started = [start(token_s=0.001, socket=place)]
    fleet.wait(lambda: all(s.done for s in asked), asked, "x")
    assert given == ["actor"]
    calm = generate(fleet_of([start()]), samples=2)
    for one, sample in zip(calm, asked, strict=True):
        assert one.response_tokens.tolist() == sample.pieces[0].tokens.tolist()


def test_a_request_under_which_every_server_fails_ends_the_run(start, fleet_of) -> None:
    servers = [start() for _ in range(6)]
    for server in servers:
        server.fault = lambda body: web.Response(status=500, text="boom")
    with pytest.raises(ServerFailed, match="the request for prompt p0 has failed 6 times"):
        generate(fleet_of(servers, "rollout.max_in_flight=1"), prompts=PROMPTS[:1], samples=1)


BAD = {
    "refused": (
        lambda body: web.json_response({"error": "prompt too long"}, status=400),
        RequestRefused, "answered with status 400.*prompt too long",
    ),
    "not json": (
        lambda body: web.Response(text="<html>"), ServerFailed, "not one of vLLM's generate route",
    ),
    "another prompt": (
        lambda body: web.json_response(
            answer_of(body | {"token_ids": [1]}, [11], finish="stop", version="0")
        ),
        PromptMismatch, "prompt p0: the server saw 1 tokens with 0 visual ones, the trainer has",
    ),
    "empty": (
        lambda body: web.json_response(answer_of(body, [], finish="stop", version="0")),
        ServerFailed, "prompt p0: an empty response",
    ),
    "a placeholder": (
        lambda body: web.json_response(
            answer_of(body, [SHAPE.image_token_id], finish="stop", version="0")
        ),
        ServerFailed, "prompt p0: a media placeholder was sampled",
    ),
    "no log-probs": (
        lambda body: web.json_response(
            {"prompt_token_ids": body["token_ids"],
             "choices": [{"token_ids": [11], "finish_reason": "stop", "logprobs": None}]}
        ),
        ServerFailed, "1 response tokens, 0 log-probs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(BAD))
def test_what_no_server_would_answer_better_ends_the_run(kind: str, start, fleet_of) -> None:
    server = start()
    server.fault, error, message = BAD[kind]
    if kind in ("empty", "a placeholder"):  # a fault of a server: it is tried elsewhere first
        fleet = fleet_of([server], "rollout.patience_s=0.5")
        with pytest.raises(ServerFailed, match=message):
            generate(fleet, prompts=PROMPTS[:1], samples=1)
        return
    with pytest.raises(error, match=message):
        generate(fleet_of([server]), prompts=PROMPTS[:1], samples=1)


def test_a_key_is_sent_and_a_missing_one_is_named(
    start, fleet_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(key="secret")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RequestRefused, match="environment variable VLLM_API_KEY"):
        generate(fleet_of([server]))
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert len(generate(fleet_of([server]))) == 18


def test_a_wrong_key_is_told_from_a_missing_one(
    start, fleet_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "mine")
    fleet = fleet_of([start(key="another")])
    wrong = "asks for another key than the one in the environment variable VLLM_API_KEY"
    with pytest.raises(RequestRefused, match=wrong):
        generate(fleet, samples=1)


def test_a_proxy_in_the_environment_is_not_used(
    start, fleet_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(generate(fleet_of([start()]))) == 18


def test_a_server_that_is_not_there_is_named(fleet_of) -> None:
    with pytest.raises(ServerFailed, match=r"http://127.0.0.1:9/health: .*is the server running\?"):
        fleet_of(["http://127.0.0.1:9"])


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("served", "qwen", "serves qwen, not this run's model; start it with"),
        ("longest", 100, "takes 100 tokens a sequence, and .* is 288; start it with"),
        ("workers", 4, "has 4 workers, and rollout.tensor is 1; start it with"),
    ],
)
def test_a_server_of_another_kind_is_refused(
    what: str, value: object, message: str, start, fleet_of
) -> None:
    server = start()
    setattr(server, what, value)
    with pytest.raises(ServerFailed, match=message):
        fleet_of([server])


def test_servers_that_register_are_found(start, tmp_path: Path) -> None:
    servers = [start(), start()]
    more = [f"run.root={tmp_path}", "run.name=r", "rollout.servers=0", "rollout.expect=2",
            "rollout.startup_timeout_s=0.6"]  # fmt: skip
    config = load_config(ROOT / "configs" / "tiny.toml", more)
    with contextlib.closing(Client()) as client:
        register(config, servers[0].address)
        register(config, Address("http://127.0.0.1:9"))  # of a node that was killed
        lacks = r"has 1 of rollout.expect=2 servers after .* \(http://127.0.0.1:9 did not answer\)"
        with pytest.raises(ServerFailed, match=lacks):
            registered(config, client)
        register(config, servers[1].address)
        found = registered(config, client)
        assert {str(address) for address in found} == {str(server.address) for server in servers}
        unregister(config, servers[0].address)
        with pytest.raises(ServerFailed, match="has 1 of"):
            registered(config, client)


def test_a_server_on_another_machine_needs_the_trainer_s_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would try to fetch weights from itself, until a deadline ends the run."""
    away = Address("http://10.0.0.9:8000")
    more = [f"run.root={tmp_path}", "run.name=r", "rollout.servers=0"]
    tiny, listed = ROOT / "configs" / "tiny.toml", f'rollout.urls=["{away}"]'
    wrong = "10.0.0.9:8000 would look for the trainer at rollout.transfer_address='127.0.0.1'"
    with pytest.raises(ConfigError, match=wrong):
        load_config(tiny, [*more, listed])
    load_config(tiny, [*more, listed, "rollout.transfer_address=10.0.0.1"])
    load_config(tiny, [*more, 'rollout.urls=["http://localhost:8000", "unix:/tmp/a"]'])
    config = load_config(tiny, [*more, "rollout.expect=1"])
    register(config, away)
    monkeypatch.setattr(register_module, "_answering", lambda client, addresses: addresses)
    with pytest.raises(ConfigError, match=wrong):
        registered(config, None)  # type: ignore[arg-type]
    config = load_config(tiny, [*more, "rollout.expect=1", "rollout.transfer_address=10.0.0.1"])
    assert registered(config, None) == [away]  # type: ignore[arg-type]


def test_a_server_registers_where_it_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config", str(ROOT / "configs" / "tiny.toml"), "--register", "--host", "0.0.0.0"]
    monkeypatch.setattr("sys.argv", ["serve", *words])
    with pytest.raises(SystemExit, match="--host 0.0.0.0, which is no address of theirs"):
        serve.main()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "the servers stay"),
        (["rollout.max_staleness=2"], "its own responses, and those of weights up to 2 steps old "
         "are trained as if the current ones had sampled them"),
        (["rollout.max_staleness=1", "rl.importance_cap=2"], "weighed by at most 2 for it"),
        (["rollout.max_staleness=2", "rollout.partial=true"], "a step takes the finished respons"),
        (["rollout.max_staleness=1", "rl.policy_steps=2"], "the ratios of rl.policy_steps=2 are to "
         "the trainer's weights of the step"),
    ],
)  # fmt: skip
def test_the_start_says_what_overlap_means(more: list[str], said: str, start, fleet_of) -> None:
    assert said in fleet_of([start()], *more).describe()


def test_a_node_starts_anew_what_fails_and_registers_it(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python -m ovr_fast.rollout.serve``, of whose first server processes stay for a while."""
    more = [f"run.root={tmp_path}", "run.name=r", "rollout.servers=0", "rollout.expect=2"]
    config, made = load_config(ROOT / "configs" / "tiny.toml", more), list[OwnServer]()
    looks = 0

    def server(options: object, *, log: Path, devices: object, port: tuple[str, int]) -> OwnServer:
        made.append(OwnServer(stub=start(), port=port[1]))
        return made[-1]

    def stays() -> None:
        raise ServerFailed("processes 7 did not end")

    def check() -> None:
        nonlocal looks
        looks += 1
        found = {file.read_text().strip() for file in (tmp_path / "r.servers").glob("*")}
        if looks == 1:
            assert len(found) == 2
            made[0].stub.stop()
            made[0].kill = stays
        elif len(found) == 2:  # the other, and a new one
            assert found == {str(made[i].address) for i in (1, 2)}
            raise Stopped("SIGTERM")
        assert looks < 2000

    monkeypatch.setattr(serve, "Server", server)
    monkeypatch.setattr(serve, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(stopping, "check", check)
    node = serve.Node(
        config, None, host="127.0.0.1", port=9, count=2, on_gpu=False, registers=True
    )  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(Stopped):
        node.run()
    assert [one.port for one in made] == [9, 10, 9]
    node.close()
    assert all(one.stub._loop.is_closed() for one in made[1:])
    assert not [*(tmp_path / "r.servers").glob("*")]


def test_a_server_whose_processes_stay_leaves_the_others_at_work(start, fleet_of) -> None:
    """They have a GPU of their own: the run needs nothing of it."""

    def stays() -> None:
        raise ServerFailed("processes 7 did not end")

    fleet = fleet_of([start(), start()])
    member = fleet.members[0]
    end = dict.fromkeys(("check_alive", "terminate", "stop"), lambda: None)
    member.server = SimpleNamespace(kill=stays, **end)
    member.launch = lambda life: pytest.fail("started beside its old processes")
    fleet.client.run(lost(fleet, 0))
    assert len(generate(fleet)) == 18
    time.sleep(0.2)
    assert (fleet.health.failure, member.state) == (None, State.FAILED)


def test_what_was_refused_is_not_waited_for(start, fleet_of) -> None:
    server = start()
    server.fault = BAD["refused"][0]
    fleet = fleet_of([server])
    asked = submitted(fleet, prompts=PROMPTS[:1], samples=1, max_tokens=20)
    with pytest.raises(RequestRefused):
        fleet.wait(lambda: all(s.done for s in asked), asked, "x")
    fleet.client.run(asyncio.wait_for(fleet.sampler.suspend(), 5))
    assert fleet.members[0].state is State.SERVING


def test_a_sync_that_cannot_be_broken_off_ends_servers_and_process(
    start, fleet_of, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(weight_sync, "GRACE_S", 1.0)  # the call's own time ends before
    monkeypatch.setattr(weight_sync.os, "_exit", ended.append)
    monkeypatch.setattr(stopping, "LAST_WORDS", [lambda: ended.append("servers")])
    works, hangs = start(), start()
    fleet = fleet_of([works, hangs])
    hangs.silent = True
    sync = object.__new__(weight_sync.WeightSync)
    sync.rank, sync._source = 0, weight_sync.MegatronWeights(everywhere=False)
    sync._holds_on, sync.lost = False, lambda: "server 0 failed: it is gone"
    addresses = (works.address, hangs.address)
    sync.servers = weight_sync._Fanout(fleet.client, addresses, 1, 1.5, patient=False)
    sync._source.at = "had taken lm_head.weight to send"
    with sync._deadline(time.monotonic()):
        with pytest.raises(ServerFailed, match="did not answer within"):
            sync.servers.post_all("update_weights")
        time.sleep(2.0)  # as a broadcast does
    assert ended == ["servers", 1]
    said = capsys.readouterr().err
    assert "(rollout.sync_timeout_s=1.5) and cannot be broken off: rank 0 had taken " in said
    assert f"lm_head.weight to send, and {hangs.address} had not answered update_weig" in said
    assert str(works.address) not in said
    sync.servers.timeout_s = 0.05
    monkeypatch.setattr(weight_sync, "GRACE_S", 0.0)
    with sync._deadline(time.monotonic()):
        pass
    time.sleep(1.0)
    assert len(ended) == 2
    hangs.silent = False


@pytest.mark.parametrize("refuses", [False, True], ids=["lost", "refuses"])
def test_a_broadcast_that_cannot_end_is_not_waited_for(
    refuses: bool, start, fleet_of, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Under NCCL, long before its time is over: a server has gone, or has said no."""
    ended: list[object] = []
    monkeypatch.setattr(weight_sync, "CAUSE_S", 1.4)
    monkeypatch.setattr(weight_sync, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(weight_sync.os, "_exit", ended.append)
    monkeypatch.setattr(stopping, "LAST_WORDS", [])
    server = start()
    fleet = fleet_of([server])
    sync = object.__new__(weight_sync.WeightSync)
    sync.rank, sync._source = 0, weight_sync.MegatronWeights(everywhere=False)
    keys = keys_of(fleet.members)
    sync._holds_on, sync.lost = True, lambda: fleet.delivery._lost(keys)
    sync.servers = weight_sync._Fanout(fleet.client, (server.address,), 1, 60, patient=False)
    with sync._deadline(time.monotonic()):
        server.broken = {"update_weights", "start_weight_update"}
        with pytest.raises(ServerFailed):  # which is asked again, with no collective begun
            sync.servers.start_weight_update()
        time.sleep(1.5)
        assert not ended
        if refuses:
            with pytest.raises(ServerFailed):
                sync.servers.update_weights({})
            time.sleep(2.5)
        else:
            member = fleet.members[0]
            fleet.client.run(lost(fleet, 0))
            time.sleep(1.5)
            assert not ended  # no broadcast waits for it
            server.broken, server.mute = set(), {"update_weights"}
            sync.servers.timeout_s = 0.3
            with pytest.raises(ServerFailed):
                sync.servers.update_weights({})
            time.sleep(1.5)
            assert not ended  # the broadcast is over
            member.state, member.life = State.STARTING, member.life + 1  # as one of ours
            sync.servers.timeout_s = time.monotonic() - sync.servers.began + 3
            with pytest.raises(ServerFailed):
                sync.servers.update_weights({})
    assert ended == [1]
    said = capsys.readouterr().err
    cause = "update_weights answered with status 500" if refuses else "failed: no token for"
    assert cause in said.partition("cannot be broken off: ")[2].partition("; rank 0 was making")[0]


def test_a_server_whose_engine_hangs_in_a_sync_is_given_up(start, fleet_of) -> None:
    """Its front says that all is well, and its workers nothing: it is used again when they do. One
    whose workers know no such question has answered."""
    servers = [start(), start()]
    fleet = fleet_of(servers, "rollout.probe_timeout_s=1")
    closed: list[bool] = []
    fleet.delivery._sync = SimpleNamespace(close=lambda: closed.append(True))
    servers[0].mute, servers[1].broken = {"collective_rpc"}, {"collective_rpc"}
    first, other = fleet.members
    assert not fleet.delivery.settle(keys_of(fleet.members), ServerFailed("its time is over"))
    assert (first.state, other.state, closed) == (State.FAILED, State.SERVING, [True])
    assert "collective_rpc did not answer within 1.0 s" in first.why
    time.sleep(4.0)
    assert first.state is State.FAILED
    servers[0].mute.clear()
    deadline = time.monotonic() + 20
    while first.state is not State.READY:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(ServerFailed, match="its time is over"):  # nobody hangs
        fleet.delivery.settle(keys_of(fleet.members), ServerFailed("its time is over"))


def test_the_server_that_keeps_no_transfer_is_named(start, fleet_of) -> None:
    """A trainer that comes back ends the transfer that the one before may have left open; where
    none is, that is no fault."""
    works, fails = start(), start()
    fleet = fleet_of([works, fails])
    works.broken = {"finish_weight_update"}  # there is none
    fails.broken = {"shutdown_weight_transfer_engine"}
    addresses = (works.address, fails.address)
    servers = weight_sync._Fanout(fleet.client, addresses, 1, 60, patient=False)
    with pytest.raises(ServerFailed, match=f"{fails.address}/shutdown_weight_transfer_engine"):
        servers.init_weight_transfer_engine({})


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_an_engine_that_answers_no_call_of_a_sync_is_given_up(
    backend: str, start, fleet_of
) -> None:
    """And the other goes on, under NCCL too, where a call that was not answered in time was none to
    take part in a broadcast."""
    servers = [start(), start()]
    fleet = fleet_of(servers, "rollout.probe_timeout_s=1")
    fleet.delivery.placement = Placement(transfer_backend=backend, sleeps=False)
    fleet.delivery._sync = SimpleNamespace(close=lambda: None)
    servers[0].mute = {"collective_rpc"}
    assert not fleet.delivery.settle(keys_of(fleet.members), ServerSilent("no answer"))
    assert [member.state for member in fleet.members] == [State.FAILED, State.SERVING]


def test_a_server_that_is_back_has_a_new_record(start, fleet_of) -> None:
    """The requests that failed before do not count, and it was away from its failure on, however
    often its start has failed since."""
    fleet = fleet_of([start()])
    (member,), health = fleet.members, fleet.health
    tries: list[int] = []
    naps: list[float] = []

    class Launched(OwnServer):
        async def ready(self, client: Client, timeout_s: float) -> None:
            tries.append(1)
            if len(tries) < 3:
                raise ServerFailed("no memory")

    async def nap(seconds: float) -> None:
        naps.append(seconds)

    async def restart() -> None:
        member.doubts, member.life, member.state = 3, 5000, State.FAILED
        member.failed_at = time.monotonic() - 100
        member.launch = lambda life: Launched(
            stub=SimpleNamespace(address=member.address, stop=int)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "sleep", nap)
            await health._restart(member)

    fleet.client.run(restart())
    member.launch = None
    assert naps == [60.0, 60.0]
    assert (member.state, member.doubts) == (State.READY, 0)
    counters = fleet.counters()
    assert counters["servers/restarts"] == 3
    assert counters["servers/lost_s"] == pytest.approx(100, abs=5)
    assert fleet.counters()["servers/lost_s"] == 0


def test_a_node_gives_up_a_start_that_does_not_end(start, tmp_path: Path) -> None:
    more = [f"run.root={tmp_path}", "run.name=r", "rollout.startup_timeout_s=0.1"]
    config = load_config(ROOT / "configs" / "tiny.toml", more)
    node = serve.Node(
        config, None, host="127.0.0.1", port=9, count=1, on_gpu=False, registers=True
    )  # type: ignore[arg-type]  # fmt: skip
    node.servers = [OwnServer(stub=start())]
    node.servers[0].stub.silent = True
    node.starts, node.starting = [5000], {0: time.monotonic()}
    node._look(0)
    assert not node.again
    time.sleep(0.7)
    node._look(0)
    assert 50 < node.again[0] - time.monotonic() <= 60
    assert not node.starting
    node.close()


def test_keys_that_a_server_keeps_end_a_sync(start, fleet_of) -> None:
    """Of weights before: requests that are not this run's hold them."""
    servers = [start(), start()]
    fleet = fleet_of(servers)
    addresses = tuple(server.address for server in servers)
    fanout = weight_sync._Fanout(fleet.client, addresses, 1, 5.0, patient=False)
    fanout.reset_caches(encoder=True)
    assert servers[1].asked[-2:] == ["/reset_prefix_cache", "/reset_encoder_cache"]
    servers[1].answers["reset_prefix_cache"] = {"success": False}
    with pytest.raises(ServerFailed, match=rf"{servers[1].address} kept keys and values of its"):
        fanout.reset_caches(encoder=True)


@pytest.mark.parametrize("exact", [True, False])
def test_the_canary_learns_what_is_usual(exact: bool) -> None:
    """In float32 1e-3 nats; else up to 0.3 at first, then four times the median of what was."""
    chat = ChatTemplate(BASE_MODEL, image_token_id=SHAPE.image_token_id)
    none = ImageLimits(count=0, width=0, height=0)
    canary = Canary.of(chat, none, exact=exact)
    for version, gap in enumerate([9e-4, 9e-4, 9e-4] if exact else [0.01, 0.02, 0.01]):
        canary.judge([("server 0", gap)], version=version)
    limit = 1e-3 if exact else 0.04
    for gap in (1.01 * limit, float("nan")):
        with pytest.raises(StaleWeights, match=r"server 1 does not sample from the .* step 3"):
            canary.judge([("server 0", 0.0), ("server 1", gap)], version=3)
    canary.judge([("server 0", 0.99 * limit)], version=3)
    first = Canary.of(chat, none, exact=exact)
    with pytest.raises(StaleWeights, match="does not sample from the weights of step 0"):
        first.judge([("server 0", 0.31)], version=0)


def test_a_sync_that_nobody_joins_ends_in_its_time(start, fleet_of) -> None:
    """The server says yes and does nothing."""
    fleet = fleet_of([start()], "rollout.sync_timeout_s=1.5")
    began = time.monotonic()
    with pytest.raises(ServerFailed, match=r"did not join the trainer at 127.*0 of 1 workers"):
        fleet.sync(type("Model", (), {})(), version=1)
    assert time.monotonic() - began < 20


def test_suspended_samples_go_on_from_where_they_are(start, fleet_of) -> None:
    server = start(token_s=0.01, mean=1000)
    fleet = fleet_of([server])
    asked = submitted(fleet, prompts=PROMPTS[:2], samples=2, max_tokens=60)
    for sample in asked:
        sample.attempts = 5  # of requests that failed before
    time.sleep(0.25)
    fleet.client.run(fleet.sampler.suspend())
    assert server.now == 0
    kept = [s.tokens_so_far for s in asked]
    assert all(0 < count < 60 for count in kept)
    assert not any(s.attempts for s in asked)
    assert not any(s.done for s in asked)
    server.version, asked_before = "7", len(server.bodies)
    fleet.sampler.version = 7
    fleet.client.run(fleet.sampler.release())
    fleet.wait(lambda: all(s.done for s in asked), asked, "x")
    for sample, count in zip(asked, kept, strict=True):
        response = sample.response(fleet.decoding.decoder, prompt_index=0)
        assert len(response.response_tokens) == 60
        assert [tuple(span) for span in response.versions] == [(0, 0), (7, count)]
        assert response.text == fleet.decoding.decoder.text(response.response_tokens.tolist())
    for body in server.bodies[asked_before:]:
        step, index, number, count, _ = body["request_id"].split("-")
        sample = next(s for s in asked if (s.asked.index, s.number) == (int(index), int(number)))
        assert body["token_ids"] == sample.asked.placed + sample.pieces[0].tokens.tolist()
        assert body["sampling_params"]["max_tokens"] == 60 - int(count)
        assert body["sampling_params"]["seed"] != sample.seed


def test_a_hung_server_does_not_cost_a_stop_its_checkpoint(
    start, fleet_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(token_s=0.01, mean=1000)
    fleet = fleet_of([server], "rollout.probe_timeout_s=60")
    submitted(fleet, prompts=PROMPTS[:1], samples=2, max_tokens=60)
    time.sleep(0.1)
    server.silent = True
    monkeypatch.setattr(sampler, "STOP_PATIENCE_S", 0.5)
    monkeypatch.setattr(stopping._Request, "now", "SIGTERM")
    with stopping.not_inside():
        fleet.client.run(asyncio.wait_for(fleet.sampler.suspend(), 10))
    assert fleet.members[0].state is State.FAILED
    server.silent = False


def test_large_answers_are_decoded_beside_the_trainer() -> None:
    decoding = Decoding(BASE_MODEL / "tokenizer.json")
    client = Client()
    try:
        body = {"request_id": "x", "token_ids": [5, 6]}
        rng = np.random.default_rng(0)
        tokens = rng.integers(10, 400, 9_000).tolist()
        content = json.dumps(answer_of(body, tokens, finish="length", version="3")).encode()
        assert len(content) > OWN_BYTES
        here = decoding.decoder.piece(content)

        async def many() -> list:
            return await asyncio.gather(*(decoding.piece(content) for _ in range(4)))

        for there in client.run(many()):
            assert np.array_equal(here.tokens, there.tokens)
            assert np.array_equal(here.logprobs, there.logprobs)
            assert here.text == there.text
            assert (here.versions, here.finish_reason) == (there.versions, there.finish_reason)
            assert here.prompt_tokens.tolist() == there.prompt_tokens.tolist() == [5, 6]
        for worker in decoding._workers:
            assert worker.process is not None
            worker.process.kill()
        for worker in decoding._workers:  # they have ended while they had nothing to do
            while worker.process.returncode is None:
                time.sleep(0.02)
        for _ in range(2):  # decoded here at first, then by processes that were started anew
            for there in client.run(many()):
                assert np.array_equal(here.tokens, there.tokens)
        assert all(worker.process.returncode is None for worker in decoding._workers)
        with pytest.raises(ValueError, match="choices"):
            client.run(decoding.piece(b'{"a": "' + b"x" * OWN_BYTES + b'"}'))
    finally:
        client.run(decoding.close())
        client.close()


def test_servers_sleep_once_and_wake_in_two_parts(start, fleet_of) -> None:
    server = start()
    shared = fleet_of([server])
    barriers: list[int] = []
    shared.mesh.barrier = lambda: barriers.append(len(server.asked))
    shared.placement = Placement(transfer_backend="gloo", sleeps=True)
    del server.asked[:]
    shared.sleep()
    shared.sleep()
    shared._wake({"weights"})  # as for a weight sync
    shared._wake({"weights", "kv_cache"})  # as for generation
    shared._wake({"weights", "kv_cache"})
    assert server.asked == ["/sleep?level=1", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"]
    assert barriers == [1, 2]  # before each wake: no rank's memory is still to be freed
    shared.sleep()
    shared._wake({"weights"})
    shared.sleep()  # with the keys and values asleep the weights still go
    assert server.asked[3:] == ["/sleep?level=1", "/wake_up?tags=weights", "/sleep?level=1"]
    alone = fleet_of([server])
    del server.asked[:]
    alone.sleep()
    alone._wake({"weights", "kv_cache"})
    assert server.asked == []


class OwnServer(SimpleNamespace):
    """A stub as one of the run's own servers."""

    stub: StubServer

    @property
    def address(self) -> Address:
        return self.stub.address

    async def ready(self, client: Client, timeout_s: float) -> None:
        await client.fetch(self.address, "GET", "health", timeout_s=5)

    def check_alive(self) -> None:
        if self.stub._loop.is_closed():
            raise ServerFailed("the vLLM server stopped with code -9")

    def kill(self) -> None:
        self.stub.stop()

    terminate = stop = kill


class Scorer(SimpleNamespace):
    """A learner whose log-probs are the servers', and ``off`` more."""

    off = 0.0
    model = None
    vision = SimpleNamespace(uncounted=contextlib.nullcontext)

    def logprobs(self, batches: list[Microbatch], *, temperature: float) -> list[torch.Tensor]:
        self.seen = len(batches)
        return [batch.rollout_logprobs_R + self.off for batch in batches]


def told(server: StubServer) -> list[str]:
    """What it was told of sleep."""
    return [path for path in server.asked if path.startswith(("/sleep", "/wake_up"))]


@pytest.fixture
def colocated(start, fleet_of, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """Makes a fleet of servers on the trainer's GPUs, a learner whose weights they have, and a list
    of the servers that are started anew."""

    def one(*servers: StubServer) -> tuple[Fleet, Scorer, list[StubServer]]:
        fleet, learner, again = fleet_of(list(servers)), Scorer(), []

        def launch(life: int) -> OwnServer:
            again.append(start())
            return OwnServer(stub=again[-1])

        for member, stub in zip(fleet.members, servers, strict=True):
            member.launch, member.server = launch, OwnServer(stub=stub)  # type: ignore[assignment]
        fleet.placement = fleet.delivery.placement = Placement(transfer_backend="gloo", sleeps=True)
        fleet.health.sleeps = True

        def give(model: Scorer, keys: tuple) -> bool:
            for number, _ in keys:
                server: Any = fleet.members[number].server
                server.stub.version = str(fleet.delivery.version)
            fleet.delivery._check_weights(model, keys)
            return fleet.delivery.settle(keys, None)

        monkeypatch.setattr(fleet.delivery, "give", give)
        fleet.sleep()
        fleet.sync(learner, version=1)
        for stub in servers:
            del stub.asked[:]
        return fleet, learner, again

    return one


def test_a_colocated_server_that_dies_starts_again_before_the_next_weights(
    start, colocated
) -> None:
    """Not while the others sample, nor while the trainer has the GPUs."""
    calm = generate(fleet_calm := colocated(start())[0], samples=8)
    fleet_calm.close()
    going, staying = start(token_s=0.01), start(token_s=0.01)
    fleet, learner, again = colocated(going, staying)
    fleet.wake()
    asked = submitted(fleet, prompts=PROMPTS, samples=8, max_tokens=40)
    time.sleep(0.15)
    going.stop()
    fleet.wait(lambda: all(s.done for s in asked), asked, "x")
    for response, sample in zip(calm, asked, strict=True):
        assert response.response_tokens.tolist() == sample.pieces[0].tokens.tolist()
    fleet.sleep()
    assert not again
    fleet.sync(learner, version=2)
    assert [told(server) for server in again] == [["/sleep?level=1", "/wake_up?tags=weights"]]
    assert [m.state for m in fleet.members] == [State.SERVING] * 2
    fleet.wake()
    assert told(again[0])[-1] == "/wake_up?tags=kv_cache"
    assert len(again[0].bodies) == 1  # the canary
    generate(fleet, samples=8)
    assert len(again[0].bodies) > 1


def test_with_no_colocated_server_left_all_start_again_at_once(start, colocated) -> None:
    calm = generate(colocated(start())[0], samples=2)
    server = start(token_s=0.001)
    fleet, _, again = colocated(server)
    fleet.wake()
    server.hold = lambda body: 0  # none is finished
    asked = submitted(fleet, prompts=PROMPTS, samples=2, max_tokens=40)
    time.sleep(0.1)
    server.stop()
    fleet.wait(lambda: all(s.done for s in asked), asked, "x")
    assert told(again[0]) == ["/sleep?level=1", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"]
    for response, sample in zip(calm, asked, strict=True):
        assert response.response_tokens.tolist() == sample.pieces[0].tokens.tolist()


def test_a_colocated_server_that_dies_asleep_is_left_out_of_what_is_asked(start, colocated) -> None:
    going, staying = start(), start()
    fleet, learner, again = colocated(going, staying)
    fleet.sleep()
    going.stop()
    fleet.wake()  # finds out
    assert [m.state for m in fleet.members] == [State.FAILED, State.SERVING]
    assert len(generate(fleet)) == 18
    fleet.sleep()
    fleet.sync(learner, version=2)
    assert len(again) == 1


def test_servers_that_sleep_sample_the_canary_awake_and_it_is_scored_when_they_sleep(
    start, colocated
) -> None:
    servers = [start(), start()]
    fleet, learner, _ = colocated(*servers)
    fleet.wake()
    assert [server.bodies[0]["request_id"][:2] for server in servers] == ["0-", "0-"]
    generate(fleet)
    assert not hasattr(learner, "seen")  # there is no room for both
    fleet.sleep()
    assert learner.seen == 2
    fleet.sync(learner, version=2)
    fleet.wake()
    learner.off = 0.5
    with pytest.raises(StaleWeights, match="server 0 does not sample from the weights of step 2"):
        fleet.sleep()
    fleet.wake()  # each delivery has one canary
    fleet.sleep()


def test_a_colocated_server_that_hangs_is_dead_before_the_trainer_works(start, colocated) -> None:
    """Its memory is the trainer's."""
    hanging, good = start(token_s=0.001), start(token_s=0.001)
    fleet, _, again = colocated(hanging, good)
    killed, allowed = threading.Event(), threading.Event()
    kill = fleet.members[0].server.kill

    def slowly() -> None:
        allowed.wait(60)
        kill()
        killed.set()

    fleet.members[0].server.kill = slowly
    fleet.wake()
    fleet.client.run(lost(fleet, 0))
    assert len(generate(fleet)) == 18
    assert not killed.is_set()
    threading.Timer(0.5, allowed.set).start()
    fleet.sleep()
    assert killed.is_set()
    assert not again


async def lost(fleet: Fleet, number: int) -> None:
    fleet.health.lost(fleet.members[number], "no token for 600 s")


def test_a_colocated_server_that_never_gets_going_is_given_up(start, colocated) -> None:
    """Each start ends at the canary; no answer of its ends the trying."""
    bad = start(token_s=0.05, mean=1000)
    fleet, _, again = colocated(bad)
    launch = fleet.members[0].launch

    def broken(life: int) -> OwnServer:
        server = launch(life)
        server.stub.fault = lambda body: web.Response(status=500, text="out of memory")
        return server

    fleet.members[0].launch = broken
    fleet.wake()
    asked = submitted(fleet, prompts=PROMPTS[:1], samples=2, max_tokens=40)
    bad.stop()
    with pytest.raises(ServerFailed, match=r"no server is left: each has failed 3 times without "):
        fleet.wait(lambda: all(s.done for s in asked), asked, "x")
    assert len(again) == 3


def test_one_colocated_server_that_never_starts_leaves_the_others_at_work(start, colocated) -> None:
    going, staying = start(), start()
    fleet, learner, again = colocated(going, staying)

    async def never(client: Client, timeout_s: float) -> None:
        raise ServerFailed("the vLLM server stopped with code 1")

    launch = fleet.members[0].launch

    def broken(life: int) -> OwnServer:
        server = launch(life)
        server.ready = never
        return server

    fleet.members[0].launch = broken
    going.stop()
    for version in range(2, 7):
        fleet.wake()
        assert len(generate(fleet)) == 18
        fleet.sleep()
        fleet.sync(learner, version=version)
    assert len(again) == 3


def test_a_canary_is_scored_though_its_server_has_died(start, colocated) -> None:
    first = start(token_s=0.001)
    fleet, learner, again = colocated(first)
    fleet.wake()
    first.hold = lambda body: 0
    asked = submitted(fleet, prompts=PROMPTS, samples=2, max_tokens=40)
    time.sleep(0.1)
    first.stop()
    fleet.wait(lambda: all(s.done for s in asked), asked, "x")
    assert len(again) == 1
    fleet.sleep()
    assert learner.seen == 2


def test_a_run_that_is_stopped_while_colocated_servers_start_ends_them(
    start, colocated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint needs their memory."""
    going = start()
    fleet, learner, again = colocated(going)
    launch = fleet.members[0].launch

    async def asked_to_end(client: Client, timeout_s: float) -> None:
        raise stopping.Stopped("SIGTERM", together=True)

    def starting(life: int) -> OwnServer:
        server = launch(life)
        server.ready = asked_to_end
        return server

    fleet.members[0].launch = starting
    going.stop()
    fleet.wake()  # finds out
    with pytest.raises(stopping.Stopped):
        fleet.sync(learner, version=2)
    assert fleet.members[0].state is State.FAILED
    assert again[0]._loop.is_closed()


def test_a_stopped_run_puts_colocated_servers_to_sleep_before_its_checkpoint(
    start, colocated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what they sampled is judged. The wish to end does not break that off again."""
    server = start(token_s=0.001)
    fleet, learner, _ = colocated(server)
    fleet.wake()
    server.hold = lambda body: 1
    submitted(fleet, prompts=PROMPTS[:2], samples=2, max_tokens=40)
    source = VLLMRollouts.__new__(VLLMRollouts)
    source.fleet = fleet
    monkeypatch.setattr(stopping._Request, "now", "SIGTERM")
    with pytest.raises(stopping.Stopped), source._asleep_after():
        fleet.wait(lambda: False, [], "x")
    assert told(server)[-1] == "/sleep?level=1"
    assert learner.seen == 1


def test_a_decode_that_was_broken_off_leaves_nothing_behind() -> None:
    """The next answer is not taken for it."""
    decoding = Decoding(BASE_MODEL / "tokenizer.json")
    client = Client()

    def content(token: int) -> bytes:
        body = {"request_id": "x", "token_ids": [5]}
        return json.dumps(answer_of(body, [token] * 9_000, finish="stop", version="1")).encode()

    async def cancel_and_ask() -> list[int]:
        await decoding.piece(content(11))  # the processes are there
        await decoding.piece(content(11))
        broken = [asyncio.create_task(decoding.piece(content(20))) for _ in range(2)]
        await asyncio.sleep(0.002)
        for task in broken:
            task.cancel()
        await asyncio.gather(*broken, return_exceptions=True)
        return [int((await decoding.piece(content(token))).tokens[0]) for token in (30, 31, 32)]

    try:
        assert client.run(cancel_and_ask()) == [30, 31, 32]
    finally:
        client.run(decoding.close())
        client.close()


def test_one_failed_request_is_no_failed_server(start, fleet_of) -> None:
    server = start(token_s=0.001)
    failed: list[str] = []

    def once(body: dict) -> web.Response | None:
        if failed:
            return None
        failed.append(body["request_id"])
        return web.Response(status=500, text="hiccup")

    server.fault = once
    fleet = fleet_of([server])
    assert len(generate(fleet)) == 18
    assert (fleet.sampler._retries, fleet.members[0].life) == (1, 0)


def test_a_server_that_cannot_break_off_has_failed(start, fleet_of) -> None:
    deaf, good = start(token_s=0.01, mean=1000), start(token_s=0.01, mean=1000)
    fleet = fleet_of([deaf, good], "rollout.probe_timeout_s=1")
    submitted(fleet, prompts=PROMPTS[:2], samples=2, max_tokens=400)
    time.sleep(0.2)
    deaf._abort.clear()  # it forgets how
    fleet.client.run(fleet.sampler.suspend())
    assert fleet.members[0].state is State.FAILED
    assert not fleet.sampler._requests


def test_counters_of_a_server() -> None:
    text = (
        "# HELP vllm:generation_tokens_total x\n"
        'vllm:generation_tokens_total{engine="0",model_name="policy"} 12.0\n'
        'vllm:generation_tokens_total{engine="1",model_name="policy"} 3.0\n'
        'vllm:prompt_tokens_total{engine="0"} 5.0\n'
        'vllm:cache_config_info{block_size="128",kv_cache_size_tokens="524288"} 1.0\n'
    )
    assert Counters.parse(text) == Counters(tokens=20.0, kv_tokens=524288)
    assert Counters.parse("") == Counters(tokens=0, kv_tokens=None)


def test_an_address_is_a_url_or_a_socket_file() -> None:
    assert Address("unix:/tmp/a/vllm").socket == "/tmp/a/vllm"
    assert Address("http://h:1/").base == "http://h:1"
    assert Address("http://h:1").socket is None
