"""The vLLM servers of one node, for a trainer on others: with the options and environment that its
run needs, started anew when they fail, and ended by a signal.

    python -m ovr_fast.rollout.serve --config FILE.toml --host ADDRESS [--port 8000] [--servers 8]
        [--register] [--print] [section.key=value ...]

Give the trainer their addresses in ``rollout.urls`` and the same settings or, where both see the
run's folder, ``--register`` here and ``rollout.expect`` there. A key in the environment variable
VLLM_API_KEY, here and there, guards sampling; it does not guard the control routes (weights, sleep,
pause, remote calls): let nothing but the trainer reach ``--host``, the loopback by default.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from ovr_fast import stopping
from ovr_fast.config import Config, load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.streams import RunData
from ovr_fast.errors import OVRFastError
from ovr_fast.evaluation.in_training import read_benchmarks
from ovr_fast.rollout.client import Client, ServerFailed
from ovr_fast.rollout.placement import Placement, server_devices
from ovr_fast.rollout.register import register, unregister
from ovr_fast.rollout.server import PATIENCE, Server, ServerOptions
from ovr_fast.settings import ConfigError
from ovr_fast.shape.folder import find_model
from ovr_fast.shape.model_shape import read_shape
from ovr_fast.stopping import Stopped

LOOK_EVERY_S = 1.0

EVERYWHERE = ("", "0.0.0.0", "::")
"""Hosts to listen at all of a node's addresses, which are none to be found at."""


def options_of(config: Config, *, on_gpu: bool) -> ServerOptions:
    """The options of a server for a run.

    Raises:
        OVRFastError: settings, model or data cannot be used.
    """
    config = replace(config, rollout=replace(config.rollout, placement="disaggregated"))
    model = find_model(config.model.path)
    chat = ChatTemplate(model, image_token_id=read_shape(model).image_token_id)
    data = RunData.of(config, chat, lambda work: work())
    if "rl" in config.run.stages:
        data.training_stream("rl")
    data.evaluation_sets()
    read_benchmarks(config, data)
    placement = Placement.of(config.rollout, on_gpu=on_gpu)
    return ServerOptions.of(config, placement, model=model, images=data.image_limits)


class Node:
    """The servers of this node.

    Args:
        config: of the run.
        options: of each server.
        host: address to listen on.
        port: of the first server; the others have those after it.
        count: servers.
        on_gpu: each gets GPUs of its own.
        registers: write their addresses where the trainer looks.
    """

    def __init__(
        self,
        config: Config,
        options: ServerOptions,
        *,
        host: str,
        port: int,
        count: int,
        on_gpu: bool,
        registers: bool,
    ) -> None:
        self.config, self.options, self.host, self.port = config, options, host, port
        self.on_gpu, self.registers = on_gpu, registers
        self.client = Client()
        self.starts = [0] * count
        self.servers: list[Server] = []
        self.again: dict[int, float] = {}  # servers that failed, and when each is started anew
        self.starting: dict[int, float] = {}  # those that were, and since when

    def _start(self, number: int) -> Server:
        devices = None
        if self.on_gpu:
            devices = server_devices(number, tensor=self.config.rollout.tensor, colocated=True)
        folder = Path(self.config.run.root) / self.config.run.name / "logs"
        log = folder / f"vllm-{self.host}-{self.port + number}.{self.starts[number]}.log"
        self.starts[number] += 1
        port = (self.host, self.port + number)
        return Server(self.options, log=log, devices=devices, port=port)

    def run(self) -> None:
        """Start them, and start anew what fails, until a signal. Raises Stopped then.

        Raises:
            ServerFailed: one did not start at first.
        """
        self.servers = [self._start(number) for number in range(len(self.starts))]
        for server in self.servers:
            self.client.run(server.ready(self.client, self.config.rollout.startup_timeout_s))
            self._announce(server)
        while True:
            stopping.check()
            time.sleep(LOOK_EVERY_S)
            for number in range(len(self.servers)):
                self._look(number)

    def _look(self, number: int) -> None:
        """One server: has it failed, is it to be started anew, is it there again?"""
        server, now = self.servers[number], time.monotonic()
        if number in self.again:
            if now >= self.again[number]:
                del self.again[number]
                self.servers[number] = self._start(number)
                self.starting[number] = now
            return
        try:
            server.check_alive()
            limit = PATIENCE * self.config.rollout.startup_timeout_s
            if now - self.starting.get(number, now) > limit:
                raise ServerFailed(f"{server.address} has not ended its start in {limit:.0f} s")
        except ServerFailed as error:
            wait_s = min(60.0, 2.0 ** min(self.starts[number], 6))
            self.starting.pop(number, None)
            print(f"serve: {error}\nserve: it is started anew in {wait_s:.0f} s", flush=True)
            unregister(self.config, server.address)
            try:
                server.kill()
            except ServerFailed as left:
                print(f"serve: {left}", flush=True)
            self.again[number] = now + wait_s
            return
        if number in self.starting:
            with contextlib.suppress(ServerFailed):
                self.client.run(self.client.fetch(server.address, "GET", "health", timeout_s=1.0))
                del self.starting[number]
                self._announce(server)

    def _announce(self, server: Server) -> None:
        print(f"serve: {server.address}", flush=True)
        if self.registers:
            register(self.config, server.address)

    def close(self) -> None:
        """End them."""
        for server in self.servers:
            unregister(self.config, server.address)
            server.terminate()
        for server in self.servers:
            server.stop()
        self.client.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.rollout.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="the trainer's settings")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="of the first server")
    parser.add_argument("--servers", type=int, help="default: what the node's GPUs hold; 1 on CPUs")
    parser.add_argument("--register", action="store_true", help="tell the trainer, by a file")
    parser.add_argument("--print", action="store_true", help="print the command, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    import torch

    gpus = torch.cuda.device_count()
    try:
        if arguments.register and arguments.host in EVERYWHERE:
            raise ConfigError(
                f"--register tells the trainer to look for the servers at --host {arguments.host}, "
                "which is no address of theirs: give this node's, as the trainer sees it"
            )
        config = load_config(arguments.config, arguments.overrides)
        options = options_of(config, on_gpu=gpus > 0)
        if arguments.print:
            command = options.command(["--host", arguments.host, "--port", str(arguments.port)])
            environment = options.environment()
            changed = {k: v for k, v in environment.items() if os.environ.get(k) != v}
            print(shlex.join(["env", *(f"{k}={v}" for k, v in changed.items()), *command]))
            return
        stopping.install()
        node = Node(
            config,
            options,
            host=arguments.host,
            port=arguments.port,
            count=arguments.servers or max(1, gpus // config.rollout.tensor),
            on_gpu=gpus > 0,
            registers=arguments.register,
        )
        try:
            node.run()
        finally:
            node.close()
    except Stopped as stopped:
        print(f"serve: stopped by {stopped.name}", flush=True)
    except OVRFastError as error:
        sys.exit(f"serve: {error}")


if __name__ == "__main__":
    main()
