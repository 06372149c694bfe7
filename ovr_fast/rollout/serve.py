"""A vLLM server for a trainer on another node, with the options and environment that a run needs.

    python -m ovr_fast.rollout.serve --config FILE.toml [--host ADDRESS] [--port 8000]
        [--print] [section.key=value ...]

Give the trainer its address in ``rollout.urls`` and the same settings. The server's control routes
take no password: let nothing but the trainer reach ``--host``, which is the loopback by default.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from ovr_fast.config import load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.streams import RunData
from ovr_fast.errors import OVRFastError
from ovr_fast.rollout.placement import Placement
from ovr_fast.rollout.server import ServerOptions
from ovr_fast.shape.folder import find_model
from ovr_fast.shape.model_shape import read_shape


def options_of(path: Path, overrides: list[str], *, on_gpu: bool) -> ServerOptions:
    """The options of a server for the run that a settings file describes.

    Raises:
        OVRFastError: settings, model or data cannot be used.
    """
    config = load_config(path, overrides)
    config = replace(config, rollout=replace(config.rollout, placement="disaggregated"))
    model = find_model(config.model.path)
    chat = ChatTemplate(model, image_token_id=read_shape(model).image_token_id)
    data = RunData.of(config, chat, lambda work: work())
    if "rl" in config.run.stages:
        data.training_stream("rl")
    data.evaluation_sets()
    placement = Placement.of(config.rollout, on_gpu=on_gpu)
    return ServerOptions.of(config, placement, model=model, images=data.image_limits)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.rollout.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="the trainer's settings")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--print", action="store_true", help="print the command, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    import torch

    try:
        options = options_of(
            arguments.config, arguments.overrides, on_gpu=torch.cuda.is_available()
        )
    except OVRFastError as error:
        sys.exit(f"serve: {error}")
    command = options.command(host=arguments.host, port=arguments.port)
    environment = options.environment()
    if arguments.print:
        changed = {k: v for k, v in environment.items() if os.environ.get(k) != v}
        print(shlex.join(["env", *(f"{k}={v}" for k, v in changed.items()), *command]))
        return
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
