"""Large answers are decoded by processes beside the trainer: its own only moves their bytes.

    python -m ovr_fast.rollout.decoding TOKENIZER_JSON

reads answers from standard input and writes pieces to standard output, each with its length before
it, until the input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
import signal
import struct
import sys
from functools import partial
from pathlib import Path

from ovr_fast.lifetime import end_with_parent
from ovr_fast.rollout.protocol import Decoder, Piece

OWN_BYTES = 512 * 2**10
"""Answers under this (3,500 tokens) are decoded at once: 1.5 ms, less than two processes need to
agree about it."""

WORKERS = 2
"""Processes that decode: at 0.5 us a token each, two keep up with 4 million tokens a second."""

PATIENCE_S = 120.0
"""For one answer: the longest takes 25 ms, the first waits for the process to start."""

_LENGTH = struct.Struct("!Q")


class Decoding:
    """Decodes answers, large ones in processes of its own, which start when there is one.

    Args:
        tokenizer: the model's tokenizer.json.
    """

    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer, self.decoder = tokenizer, Decoder(tokenizer)
        self._workers: list[_Worker] = []
        self._turn = itertools.count()

    async def piece(self, content: bytes) -> Piece:
        """One answer. Raises: see ``Decoder.piece``."""
        if len(content) < OWN_BYTES:
            return self.decoder.piece(content)
        if not self._workers:
            self._workers = [_Worker(self.tokenizer) for _ in range(WORKERS)]
        try:
            return await self._workers[next(self._turn) % WORKERS].piece(content)
        except (OSError, asyncio.IncompleteReadError) as error:
            print(f"rollout: a process that decodes has ended ({error!r}); another is started")
            return self.decoder.piece(content)

    async def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            await worker.close()


class _Worker:
    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer = tokenizer
        self.process: asyncio.subprocess.Process | None = None
        self.busy = asyncio.Lock()

    async def piece(self, content: bytes) -> Piece:
        async with self.busy:
            if self.process is None:
                self.process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "ovr_fast.rollout.decoding", str(self.tokenizer),
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                    start_new_session=True,
                    preexec_fn=partial(end_with_parent, signal.SIGKILL),
                )  # fmt: skip
            try:
                async with asyncio.timeout(PATIENCE_S):
                    return await self._exchange(self.process, content)
            except BaseException:  # cancelled, too: its answer would be taken for the next one's
                process, self.process = self.process, None
                with contextlib.suppress(ProcessLookupError):  # it had ended before
                    process.kill()
                raise

    async def _exchange(self, process: asyncio.subprocess.Process, content: bytes) -> Piece:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(_LENGTH.pack(len(content)))
        process.stdin.write(content)
        await process.stdin.drain()
        (size,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
        answer = pickle.loads(await process.stdout.readexactly(size))
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.communicate()


def main() -> None:
    decoder = Decoder(Path(sys.argv[1]))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's to answer
    while head := source.read(_LENGTH.size):
        content = source.read(_LENGTH.unpack(head)[0])
        try:
            answer: Piece | Exception = decoder.piece(content)
        except Exception as error:  # the trainer's to raise
            answer = ValueError(str(error))
        data = pickle.dumps(answer, protocol=5)
        sink.write(_LENGTH.pack(len(data)))
        sink.write(data)
        sink.flush()


if __name__ == "__main__":
    main()
