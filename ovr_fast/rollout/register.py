"""Servers on other nodes: how a trainer finds them, and whether they are what it needs.

``python -m ovr_fast.rollout.serve --register`` writes a file for each server into a folder beside
the run's; a trainer with ``rollout.expect`` waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence as List
from pathlib import Path

from ovr_fast import stopping
from ovr_fast.config import Config, check_transfer_address
from ovr_fast.rollout.client import Address, Client, ServerFailed
from ovr_fast.rollout.server import ServerOptions

LOOK_EVERY_S = 0.5
ANSWER_S = 30.0
PROBE_S = 5.0


def _folder(config: Config) -> Path:
    return Path(config.run.root) / f"{config.run.name}.servers"


def _file(config: Config, address: Address) -> Path:
    return _folder(config) / address.url.partition("//")[2].replace(":", "-")


def register(config: Config, address: Address) -> None:
    """Say that a server is there."""
    file = _file(config, address)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(f"{address}\n")
    partial.rename(file)


def unregister(config: Config, address: Address) -> None:
    """Say that a server has gone."""
    _file(config, address).unlink(missing_ok=True)


def registered(config: Config, client: Client) -> list[Address]:
    """The servers that are there and answer, by name; waits for ``rollout.expect`` of them. A node
    that was killed leaves the files of its servers.

    Raises:
        ServerFailed: there were not as many within ``rollout.startup_timeout_s``.
        ConfigError: one is not on the loopback, and ``rollout.transfer_address`` is.
    """
    wanted, limit = config.rollout.expect, config.rollout.startup_timeout_s
    deadline = time.monotonic() + limit
    while True:
        stopping.check(together=True)
        listed = []
        for file in sorted(_folder(config).glob("*")):
            if file.suffix != ".partial":
                with contextlib.suppress(FileNotFoundError):  # it has just gone
                    listed.append(Address(file.read_text().strip()))
        found = _answering(client, listed)
        silent = [str(address) for address in listed if address not in found]
        if len(found) >= wanted:
            check_transfer_address(config.rollout, (address.url for address in found[:wanted]))
            return found[:wanted]
        if time.monotonic() > deadline:
            raise ServerFailed(
                f"{_folder(config)} has {len(found)} of rollout.expect={wanted} servers after "
                f"rollout.startup_timeout_s={limit:g} s"
                + (f" ({', '.join(silent)} did not answer)" if silent else "")
                + "; start them with `python -m ovr_fast.rollout.serve --register` and the same "
                "run.root and run.name"
            )
        time.sleep(LOOK_EVERY_S)


def _answering(client: Client, addresses: List[Address]) -> list[Address]:
    """Those where a server is: a port of one that has gone may be another service's."""

    async def answers(address: Address) -> bool:
        try:
            await client.fetch(address, "GET", "health", timeout_s=PROBE_S)
        except ServerFailed:
            return False
        return True

    async def ask() -> list[bool]:
        return await asyncio.gather(*(answers(address) for address in addresses))

    return [address for address, there in zip(addresses, client.run(ask()), strict=True) if there]


def check_given(client: Client, address: Address, options: ServerOptions) -> None:
    """Whether a server that somebody else started is one for this run.

    Args:
        options: with which the trainer would have started it.

    Raises:
        ServerFailed: it does not answer, asks for another key, or is another kind of server.
    """
    client.run(client.fetch(address, "GET", "health", timeout_s=ANSWER_S))
    served = client.get(address, "v1/models", timeout_s=ANSWER_S)["data"]
    how = "; start it with `python -m ovr_fast.rollout.serve` and this run's settings"
    names = [model["id"] for model in served]
    if "policy" not in names:
        raise ServerFailed(f"{address} serves {', '.join(names)}, not this run's model{how}")
    longest = served[names.index("policy")]["max_model_len"]
    if longest < options.max_model_len:
        raise ServerFailed(
            f"{address} takes {longest} tokens a sequence, and rl.max_prompt_tokens + "
            f"rl.max_response_tokens is {options.max_model_len}{how}"
        )
    try:
        workers = client.get(address, "get_world_size", timeout_s=ANSWER_S)["world_size"]
    except ServerFailed as error:
        raise ServerFailed(f"{address} has no routes for weights ({error}){how}") from error
    if workers != options.tensor_parallel:
        raise ServerFailed(
            f"{address} has {workers} workers, and rollout.tensor is {options.tensor_parallel}{how}"
        )
