"""vLLM servers as child processes: started, watched, and stopped with the trainer."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def _die_with_parent() -> None:
    """In the child: be terminated by the kernel if the trainer is killed outright."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class EngineDied(RuntimeError):
    """A vLLM server stopped or never answered. The message names its log."""


def free_port() -> int:
    """A TCP port on the loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """One ``vllm`` API server on the loopback, in a process group of its own.

    Args:
        model: Hugging Face folder to start from.
        log: file that gets the server's output.
        dtype: "float32" or "bfloat16".
        max_model_len: prompt plus response, tokens.
        max_pictures: pictures in one prompt.
        transfer_backend: "gloo", "nccl" or "ipc".
        compiled: compile the model when the server starts, or never.
        sleeps: whether it will be asked to give its GPU memory back (a CPU engine cannot).
        seed: of the engine; every request carries its own beside it.
        kv_cache_gib: memory for keys and values on a CPU.
        gpu_memory_utilization: share of a GPU the server may take.
        tensor_parallel: GPUs of this server.
        devices: what ``CUDA_VISIBLE_DEVICES`` is set to; None leaves it alone.
    """

    def __init__(
        self,
        *,
        model: Path,
        log: Path,
        dtype: str,
        max_model_len: int,
        max_pictures: int,
        transfer_backend: str,
        compiled: bool,
        sleeps: bool,
        seed: int,
        kv_cache_gib: int,
        gpu_memory_utilization: float,
        tensor_parallel: int,
        devices: str | None,
    ) -> None:
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--host", "127.0.0.1",
            "--port", str(self.port),
            "--model", str(model),
            "--served-model-name", "policy",
            "--dtype", dtype,
            "--max-model-len", str(max_model_len),
            "--limit-mm-per-prompt", json.dumps({"image": max_pictures, "video": 0}),
            "--weight-transfer-config", json.dumps({"backend": transfer_backend}),
            # The log-prob of the distribution that was sampled from, temperature included.
            "--logprobs-mode", "processed_logprobs",
            # Qwen2.5-VL's own generation settings hold repetition_penalty 1.05.
            "--generation-config", "vllm",
            "--gpu-memory-utilization", str(gpu_memory_utilization),
            "--tensor-parallel-size", str(tensor_parallel),
            "--seed", str(seed),
            "--disable-uvicorn-access-log",
        ]  # fmt: skip
        if transfer_backend == "gloo":
            # vLLM 0.32 rewinds a seeded request's generator when its prompt was prefilled in
            # parts, which a CPU generator cannot do ("CPU Generator does not use offset"): the
            # engine dies. So prompts are prefilled whole.
            budget = max(8192, max_model_len)
            command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(budget)]
        if not compiled:
            command.append("--enforce-eager")
        if sleeps:
            command.append("--enable-sleep-mode")
        environment = dict(os.environ)
        for name in list(environment):  # torchrun's variables would make vLLM join our group
            if name in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} or (
                name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_WORLD"))
            ):
                del environment[name]
        site = str(Path(__file__).parent / "site")
        environment.update(
            PYTHONPATH=os.pathsep.join(filter(None, [site, environment.get("PYTHONPATH")])),
            VLLM_SERVER_DEV_MODE="1",  # opens the weight-transfer routes
            HF_HUB_OFFLINE="1",
            VLLM_CPU_KVCACHE_SPACE=str(kv_cache_gib),
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            OMP_NUM_THREADS=environment.get("OMP_NUM_THREADS", str(os.cpu_count())),
            VLLM_NO_USAGE_STATS="1",
            # CUDA IPC handles come pickled, from the trainer, over the loopback.
            VLLM_ALLOW_INSECURE_SERIALIZATION="1" if transfer_backend == "ipc" else "0",
            VLLM_LOGGING_LEVEL="INFO",
            TOKENIZERS_PARALLELISM="false",
        )
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        atexit.register(self.stop)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Block until the server answers.

        Raises:
            EngineDied: it stopped, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        self.stop()
        raise EngineDied(
            f"the vLLM server did not answer within {timeout_s:.0f} s "
            f"(rollout.startup_timeout_s); its output is in {self.log}"
        )

    def check_alive(self) -> None:
        """Raises EngineDied if the process is gone; quotes the end of its log."""
        code = self.process.poll()
        if code is None:
            return
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise EngineDied(f"the vLLM server stopped with code {code}; from {self.log}:\n{tail}")

    def stop(self) -> None:
        """End the server and every process it started."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGTERM)
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                pass
            except ProcessLookupError:
                return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # engine cores can outlive the API server
        if self.process.poll() is None:
            self.process.wait(timeout=15)
