"""vLLM servers as child processes: started, watched, and stopped with the trainer."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from ovr_fast.config import Config
from ovr_fast.errors import OVRFastError
from ovr_fast.lifetime import end_with_parent
from ovr_fast.records import ImageLimits
from ovr_fast.rollout.placement import Placement

REPORT_EVERY_S = 20.0
"""Between two lines about a server that is still starting."""

PATIENCE = 6.0
"""A server that keeps working may take this many times ``rollout.startup_timeout_s`` in all."""

IDLE_SHARE = 0.05
"""Share of a core that a process which only waits stays under (a waiting vLLM takes 1 to 2 %)."""

_START_PHASES = (
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "preparing the model"),
    ("Dynamo bytecode transform", "compiling"),
    ("torch.compile", "compiling"),
    ("profil", "measuring its memory"),
    ("GPU KV cache size", "warming up"),
    ("CPU KV cache size", "warming up"),
    ("Warming up model", "warming up"),
    ("Started server process", "opening its port"),
)
"""Words of vLLM's log, and what it does from there on."""


class ServerFailed(OVRFastError, RuntimeError):
    """A vLLM server stopped, refused a request or did not answer; names its log or address."""


def free_port() -> int:
    """A TCP port on the loopback that nothing listens on now.

    From below the kernel's ephemeral range (32,768 and up on Linux), where no outgoing connection
    gets its port: a server binds half a minute after this, and one of the suite's died of
    "Address already in use" when two suites ran beside each other.
    """
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a vLLM server must run to work with this trainer."""

    model: Path  # Hugging Face folder to start from
    dtype: str  # "float32" or "bfloat16"
    max_model_len: int  # prompt plus response, tokens
    images: ImageLimits
    transfer_backend: str  # "gloo", "nccl" or "ipc"
    compiled: bool  # compile the model when the server starts, or never
    sleeps: bool  # whether it will be asked to give its GPU memory back (a CPU server cannot)
    seed: int  # of the engine; every request carries its own beside it
    kv_cache_gib: int  # memory for keys and values on a CPU
    gpu_memory_utilization: float  # share of a GPU the server may take
    tensor_parallel: int  # GPUs of this server

    @classmethod
    def of(
        cls, config: Config, placement: Placement, *, model: Path, images: ImageLimits
    ) -> ServerOptions:
        """The options that a run's settings ask for."""
        rollout, rl = config.rollout, config.rl
        return cls(
            model=model,
            dtype=config.model.dtype,
            max_model_len=rl.max_prompt_tokens + rl.max_response_tokens,
            images=images,
            transfer_backend=placement.transfer_backend,
            compiled=rollout.compile,
            sleeps=placement.sleeps,
            seed=config.run.seed,
            kv_cache_gib=rollout.kv_cache_gib,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            tensor_parallel=rollout.tensor,
        )

    def command(self, *, host: str, port: int) -> list[str]:
        """The command line of the server."""
        image = {"count": self.images.count}
        if self.images.count:
            image |= {"width": self.images.width, "height": self.images.height}
        limits = {"image": image, "video": {"count": 0}}
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--host", host,
            "--port", str(port),
            "--model", str(self.model),
            "--served-model-name", "policy",
            "--dtype", self.dtype,
            "--max-model-len", str(self.max_model_len),
            "--limit-mm-per-prompt", json.dumps(limits),
            "--weight-transfer-config", json.dumps({"backend": self.transfer_backend}),
            # The log-prob of the distribution that was sampled from, temperature included.
            "--logprobs-mode", "processed_logprobs",
            # Qwen2.5-VL's own generation settings hold repetition_penalty 1.05.
            "--generation-config", "vllm",
            "--gpu-memory-utilization", str(self.gpu_memory_utilization),
            "--tensor-parallel-size", str(self.tensor_parallel),
            "--seed", str(self.seed),
            "--disable-uvicorn-access-log",
        ]  # fmt: skip
        if self.transfer_backend == "gloo":
            # vLLM 0.32 rewinds a seeded request's generator when its prompt was prefilled in
            # parts, which a CPU generator cannot do ("CPU Generator does not use offset"): the
            # engine dies. So prompts are prefilled whole.
            budget = max(8192, self.max_model_len)
            command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(budget)]
        if not self.compiled:
            command.append("--enforce-eager")
        if self.sleeps:
            command.append("--enable-sleep-mode")
        return command

    def environment(self, *, devices: str | None = None) -> dict[str, str]:
        """The environment of the server.

        Args:
            devices: what ``CUDA_VISIBLE_DEVICES`` is set to; None leaves it alone.
        """
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
            VLLM_CPU_KVCACHE_SPACE=str(self.kv_cache_gib),
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            OMP_NUM_THREADS=environment.get("OMP_NUM_THREADS", str(os.cpu_count())),
            VLLM_NO_USAGE_STATS="1",
            # CUDA IPC handles come pickled, from the trainer, over the loopback.
            VLLM_ALLOW_INSECURE_SERIALIZATION="1" if self.transfer_backend == "ipc" else "0",
            VLLM_LOGGING_LEVEL="INFO",
            TOKENIZERS_PARALLELISM="false",
        )
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        return environment


class Server:
    """One ``vllm`` API server on the loopback, in a process group of its own.

    Args:
        options: of the server.
        log: file that gets the server's output.
        devices: what ``CUDA_VISIBLE_DEVICES`` is set to; None leaves it alone.
    """

    def __init__(self, options: ServerOptions, *, log: Path, devices: str | None) -> None:
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                options.command(host="127.0.0.1", port=self.port),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=options.environment(devices=devices),
                start_new_session=True,
                preexec_fn=partial(end_with_parent, signal.SIGTERM),
            )
        atexit.register(self.stop)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Block until the server answers; says every ``REPORT_EVERY_S`` what it is doing.

        A server counts as working while its log grows or its processes use the CPU, so a slow
        machine does not end a run.

        Args:
            timeout_s: longest time without either; ``PATIENCE`` times this in all.

        Raises:
            ServerFailed: it stopped, did nothing for too long, or did not end its start.
        """
        waiting_since = time.monotonic()
        progress, moved, reported = (0, 0.0), waiting_since, waiting_since
        while True:
            self.check_alive()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    print(f"vLLM is ready after {time.monotonic() - self.began:.0f} s", flush=True)
                    return
            now = time.monotonic()
            log_bytes, cpu_s = self.log.stat().st_size, _session_cpu_seconds(self.process.pid)
            busy = cpu_s - progress[1] > 0.1 + IDLE_SHARE * (now - moved)
            if log_bytes > progress[0] or busy:
                progress, moved = (log_bytes, cpu_s), now
            if now - moved > timeout_s or now - waiting_since > PATIENCE * timeout_s:
                break
            if now - reported >= REPORT_EVERY_S:
                print(f"vLLM is {self._phase()}, {now - self.began:.0f} s", flush=True)
                reported = now
            time.sleep(0.3)
        self.stop()
        silent = now - moved > timeout_s
        why = f"was silent for {now - moved:.0f} s" if silent else "did not end"
        raise ServerFailed(
            f"the vLLM server's start {why} (rollout.startup_timeout_s={timeout_s:.0f}); its "
            f"output is in {self.log}"
        )

    def _phase(self) -> str:
        """What a starting server does, from its log."""
        text, found, place = self.log.read_text(errors="replace"), "starting", -1
        for words, phase in _START_PHASES:
            if (at := text.rfind(words)) > place:
                found, place = phase, at
        return found

    def check_alive(self) -> None:
        """Raises ServerFailed if the process is gone; quotes the end of its log."""
        code = self.process.poll()
        if code is None:
            return
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise ServerFailed(f"the vLLM server stopped with code {code}; from {self.log}:\n{tail}")

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


def _session_cpu_seconds(session: int) -> float:
    """CPU time of all live processes of a session, seconds; 0 where /proc does not tell."""
    ticks = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
