"""vLLM servers as child processes: started, watched, and stopped with the trainer."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ovr_fast import stopping
from ovr_fast.config import Config
from ovr_fast.lifetime import end_with_parent
from ovr_fast.records import ImageLimits
from ovr_fast.rollout.client import Address, Client, ServerFailed
from ovr_fast.rollout.placement import Placement

REPORT_EVERY_S = 20.0
"""Between two lines about a server that is still starting."""

PATIENCE = 6.0
"""A server that keeps working may take this many times ``rollout.startup_timeout_s`` in all."""

IDLE_SHARE = 0.05
"""Share of a core that a process which only waits stays under (a waiting vLLM takes 1 to 2 %)."""

FOLDER = "ovr_fast-"
"""Prefix of servers' folders in the temporary directory."""

MOST_PATH, LONGEST_SOCKET = 108, len(f"/{'0' * 36}")
"""Bytes of a socket's path on Linux, and of the longest name of a server's sockets, vLLM's own."""

SHORT = "/tmp"
"""Where servers' folders are if TMPDIR is too long for sockets."""

NEW_S = 60.0
"""A folder may be younger than its lock."""

STOP_S = 15.0
"""A server that was asked to end is killed after this."""

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

    def command(self, listen: list[str]) -> list[str]:
        """The command line of a server.

        Args:
            listen: where; ``--uds FILE``, or ``--host ADDRESS --port NUMBER``.
        """
        image = {"count": self.images.count}
        if self.images.count:
            image |= {"width": self.images.width, "height": self.images.height}
        limits = {"image": image, "video": {"count": 0}}
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            *listen,
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
            "--enable-scale-out",  # the route that takes and gives token ids
            "--worker-extension-cls", "ovr_fast.rollout.engine_manifest.WeightManifest",
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
            # FlashInfer's sampler cannot give the log-probs that it sampled by. Without this vLLM
            # 0.32 imports it all the same, and where it is not installed the engine's start fails.
            VLLM_USE_FLASHINFER_SAMPLER="0",
            # CUDA IPC handles come pickled, from the trainer, over the loopback.
            VLLM_ALLOW_INSECURE_SERIALIZATION="1" if self.transfer_backend == "ipc" else "0",
            VLLM_LOGGING_LEVEL="INFO",
            TOKENIZERS_PARALLELISM="false",
        )
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        return environment


_GUARD = f"""
read _
kill -CONT -$0
sleep {STOP_S:g}
for process in /proc/[0-9]*; do
    read -r fields < $process/stat || continue
    set -- ${{fields##*) }}
    if [ "$4" = "$0" ] && ! grep -q resource_tracker $process/cmdline; then
        kill -KILL ${{process#/proc/}}
    fi
done
"""
"""Beside a server, whose session it is given: reads until the trainer ends, however that ends. What
has not ended by then is killed, but Python's resource trackers: see ``Server.kill``."""


class Server:
    """One ``vllm`` API server in a process group of its own.

    It listens on a socket file in a folder that only this user can open: vLLM's control routes ask
    nobody for a key, and one of them runs code. For other nodes it listens on a port.

    Args:
        options: of the server.
        log: file that gets the server's output.
        devices: what ``CUDA_VISIBLE_DEVICES`` is set to; None leaves it alone.
        port: address and port to listen on instead.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        log: Path,
        devices: str | None,
        port: tuple[str, int] | None = None,
    ) -> None:
        self.log = log
        remove_left_behind()
        self._folder = _private_folder()
        self._lock = open(f"{self._folder}/lock", "w")  # noqa: SIM115 - as long as the server
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._gone = self._dead = False
        self._killing = threading.Lock()
        self.address = Address(f"unix:{self._folder}/vllm")
        listen = ["--uds", f"{self._folder}/vllm"]
        if port is not None:
            self.address = Address(f"http://{port[0]}:{port[1]}")
            listen = ["--host", port[0], "--port", str(port[1])]
        log.parent.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        environment = options.environment(devices=devices)
        # vLLM leaves sockets and files behind when it is killed: they go with the folder. What
        # Inductor has compiled stays where the next server finds it.
        environment.setdefault(
            "TORCHINDUCTOR_CACHE_DIR",
            f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}",
        )
        environment["TMPDIR"] = self._folder
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                options.command(listen),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                preexec_fn=partial(end_with_parent, signal.SIGTERM),
            )
        atexit.register(self.stop)
        stopping.LAST_WORDS.append(self.kill_unseen)
        # A server that is frozen, or hangs, does not end by a signal that it would have to answer.
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, str(self.process.pid)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    async def ready(self, client: Client, timeout_s: float) -> None:
        """Wait until the server answers; says every ``REPORT_EVERY_S`` what it is doing.

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
            stopping.check(together=True)
            self.check_alive()
            with contextlib.suppress(ServerFailed):
                await client.fetch(self.address, "GET", "health", timeout_s=5)
                print(f"vLLM is ready after {time.monotonic() - self.began:.0f} s", flush=True)
                return
            now = time.monotonic()
            log_bytes, cpu_s = self.log.stat().st_size, _session_cpu_seconds(self.process.pid)
            progress = progress[0], min(progress[1], cpu_s)  # less where processes have ended
            busy = cpu_s - progress[1] > 0.1 + IDLE_SHARE * (now - moved)
            if log_bytes > progress[0] or busy:
                progress, moved = (log_bytes, cpu_s), now
            if now - moved > timeout_s or now - waiting_since > PATIENCE * timeout_s:
                break
            if now - reported >= REPORT_EVERY_S:
                print(f"vLLM is {self._phase()}, {now - self.began:.0f} s", flush=True)
                reported = now
            await asyncio.sleep(0.3)
        await asyncio.to_thread(self.kill)
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

    def terminate(self) -> None:
        """Ask the server to end."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """End the server and every process it started."""
        if self._gone:
            return
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=STOP_S)
        try:
            self.kill()
        except ServerFailed as error:
            print(f"rollout: {error}", flush=True)

    def kill(self) -> None:
        """End the server and every process it started, at once, and wait until they are gone with
        the memory they had. Python's resource trackers stay: they free the shared memory of the
        others, and then end.

        Raises:
            ServerFailed: some are still there after ``STOP_S``.
        """
        with self._killing:
            if self._dead:
                return
            self._gone, deadline = True, time.monotonic() + STOP_S
            while (rest := self.kill_unseen()) and time.monotonic() < deadline:
                self.process.poll()
                time.sleep(0.02)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=STOP_S if not rest else 0.1)
            self._lock.close()
            if rest:
                raise ServerFailed(
                    f"processes {', '.join(map(str, rest))} of the vLLM server with the log "
                    f"{self.log} did not end: its memory is not free"
                )
            self._dead = True
            self._guard.kill()
            self._guard.communicate()
            atexit.unregister(self.stop)
            with contextlib.suppress(ValueError):
                stopping.LAST_WORDS.remove(self.kill_unseen)

    def kill_unseen(self) -> list[int]:
        """SIGKILL to every process of the server, without waiting; which there were."""
        rest = self._rest()
        for process in rest:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        for process, _ in _session(self.process.pid):  # a frozen server's trackers free nothing
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGCONT)
        if self.process.poll() is None:
            self.process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        return rest

    def _rest(self) -> list[int]:
        """Its live processes but the resource trackers."""
        found = []
        for process, _ in _session(self.process.pid):
            with contextlib.suppress(OSError):
                if b"resource_tracker" not in Path(f"/proc/{process}/cmdline").read_bytes():
                    found.append(process)
        return found


def _parents() -> list[str]:
    """Of the folders of servers."""
    return [*dict.fromkeys((tempfile.gettempdir(), SHORT))]


def _private_folder() -> str:
    """A new one, of mode 0700, in which the path of a socket is not too long for the system."""
    usual = tempfile.gettempdir()
    longest = len(usual) + len(f"/{FOLDER}12345678") + LONGEST_SOCKET
    return tempfile.mkdtemp(prefix=FOLDER, dir=usual if longest < MOST_PATH else SHORT)


def remove_left_behind() -> None:
    """Remove the folders of servers whose trainer was killed: nobody holds their lock, and they are
    not just being made."""
    for folder in [f for parent in _parents() for f in Path(parent).glob(f"{FOLDER}*")]:
        with contextlib.suppress(OSError), open(folder / "lock", "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - folder.stat().st_mtime > NEW_S:
                shutil.rmtree(folder, ignore_errors=True)


def _session(session: int) -> Iterator[tuple[int, int]]:
    """Live processes of a session, and the clock ticks that each has used; none where /proc does
    not tell."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = entry.read_text().rpartition(")")[2].split()
            # A zombie has no memory, but while it has threads that are still ending.
            gone = fields[0] == "Z" and int(fields[17]) <= 1
            if int(fields[3]) == session and not gone:
                yield int(entry.parent.name), int(fields[11]) + int(fields[12])


def _session_cpu_seconds(session: int) -> float:
    """CPU time of all live processes of a session, seconds; 0 where /proc does not tell."""
    return sum(ticks for _, ticks in _session(session)) / os.sysconf("SC_CLK_TCK")
