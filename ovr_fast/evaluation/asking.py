"""Questions to a language model at an OpenAI-compatible address, each asked once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from collections.abc import Sequence as List
from pathlib import Path
from typing import Any

from ovr_fast.rollout.client import Address, Client, ServerFailed

AT_A_TIME = 16
TIMEOUT_S = 120.0
ATTEMPTS = 3


class Asker:
    """Asks, and remembers what was answered.

    Args:
        url: such as http://host:8000/v1.
        model: its name there.
        memory: a file that keeps every answer by what was asked, so that killed work goes on.
        usable: of an answer; another one is not kept, and asked for again the next time.
        max_tokens: of an answer.
    """

    def __init__(
        self, url: str, model: str, memory: Path, *, usable: Callable[[str], bool],
        max_tokens: int = 1024,
    ) -> None:  # fmt: skip
        self.model, self.address = model, Address(url.removesuffix("/").removesuffix("/v1"))
        self.memory, self._usable, self._max_tokens = memory, usable, max_tokens
        self._usable_now, self._client = usable, Client()
        self._known: dict[str, str] = {}
        if memory.is_file():
            whole = memory.read_bytes()
            if torn := len(whole) - (whole.rfind(b"\n") + 1):  # or the next answer is torn too
                os.truncate(memory, len(whole) - torn)
            for line in memory.read_text().splitlines():
                try:
                    row = json.loads(line)
                    self._known[row["asked"]] = row["answer"]
                except (ValueError, KeyError, TypeError):
                    continue  # torn: it is asked again
        self.why = ""  # an answer is missing, the first time

    def ask(
        self, prompts: List[str], *, seed: int = 0, usable: Callable[[str], bool] | None = None
    ) -> list[str]:
        """The answers; an unusable one (by ``usable``, or the asker's own) as it came, "" where
        there was none."""
        self._usable_now = usable or self._usable
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        return self._client.run(self._ask_all(prompts, seed))

    async def _ask_all(self, prompts: List[str], seed: int) -> list[str]:
        room = asyncio.Semaphore(AT_A_TIME)
        with open(self.memory, "a") as memory:

            async def one(asked: str, prompt: str) -> str:
                if asked not in self._known:
                    async with room:
                        answer = await self._answer(prompt, seed)
                    if answer is None or not self._usable_now(answer):
                        self.why = self.why or f"not the JSON that was asked for: {answer!r:.100}"
                        return answer or ""
                    self._known[asked] = answer
                    memory.write(json.dumps({"asked": asked, "answer": answer}) + "\n")
                    memory.flush()
                return self._known[asked]

            again = f"\n{seed}" if seed else ""
            keys = [
                hashlib.sha256(f"{self.model}{again}\n{p}".encode()).hexdigest() for p in prompts
            ]
            each = dict(zip(keys, prompts, strict=True))  # equal ones are asked once
            found = await asyncio.gather(*(one(key, prompt) for key, prompt in each.items()))
            answers = dict(zip(each, found, strict=True))
            return [answers[key] for key in keys]

    async def _answer(self, prompt: str, seed: int) -> str | None:
        body: dict[str, Any] = {
            # Greedy; another seed is for another opinion, which a greedy one would not be.
            "model": self.model, "temperature": 1.0 if seed else 0.0, "seed": seed,
            "max_tokens": self._max_tokens,
            "messages": [{"role": "user", "content": prompt}],
        }  # fmt: skip
        why = ""
        for attempt in range(ATTEMPTS):
            await asyncio.sleep(attempt**2)
            try:
                found = await self._client.ask(
                    self.address, "POST", "v1/chat/completions", body, timeout_s=TIMEOUT_S
                )
                text = found["choices"][0]["message"]["content"]
            except ServerFailed as error:
                why = str(error)
            except (KeyError, IndexError, TypeError) as error:
                why = f"its answer has no message ({error!r})"
            else:
                return str(text)
        self.why = self.why or why
        return None

    def close(self) -> None:
        """No more questions."""
        self._client.close()
