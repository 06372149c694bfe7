"""A judge of behaviours with known errors, behind the same HTTP route as a language model.

    python -m ovr_fast.toy.judge --port 8123 [--cues FILE] [--miss 0.2] [--invent 0.1]

It finds by cues, then misses a share of what it has found, and quotes the first sentence of a share
of the responses in which there was nothing: what the correction of ``ovr_fast.behaviours`` has to
undo. Which ones depends on the question alone, so that it says the same twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ovr_fast.behaviours.find import BEHAVIOURS, Cues, Instance, by_rules, read_cues, sentences
from ovr_fast.behaviours.judge import as_answer

CUES = Path(__file__).with_name("cues.toml")
_RESPONSE = re.compile(r"<response>\n(.*)\n</response>", re.DOTALL)
_BEHAVIOUR = re.compile(r"shows this behaviour: ([\w ]+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyJudge:
    """What it finds with, and its errors."""

    cues: Cues
    miss: float = 0.0
    invent: float = 0.0
    lie: float = 0.0  # share of answers with a quote that stands nowhere

    def answer(self, prompt: str) -> str:
        """To a prompt of ``behaviours.judge``."""
        found = _RESPONSE.search(prompt, max(0, prompt.rfind("<response>\n")))
        name = _BEHAVIOUR.search(prompt)
        behaviour = name[1].replace(" ", "_") if name else ""
        if found is None or behaviour not in BEHAVIOURS:
            return "I can only find behaviours."
        text = found[1]
        instances = by_rules(text, behaviour, self.cues)
        draw = int(hashlib.sha256(f"{behaviour}\n{text}".encode()).hexdigest()[:8], 16) / 2**32
        if instances and draw < self.miss:
            instances = []
        elif not instances and text.strip() and draw < self.invent:
            start, end = sentences(text)[0]
            instances = [Instance(start=start, end=end, quote=text[start:end])]
        if draw > 1 - self.lie:
            quote = "words that nobody wrote"
            instances = [*instances, Instance(start=0, end=0, quote=quote)]
        return as_answer(instances)


def serve(judge: ToyJudge, port: int = 0) -> ThreadingHTTPServer:
    """A server on the loopback, which the caller runs (``serve_forever``) and closes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = judge.answer(body["messages"][-1]["content"])
            answer: dict[str, Any] = {"choices": [{"message": {"content": text}}]}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description="A judge of behaviours with known errors.")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--cues", type=Path, default=CUES)
    parser.add_argument("--miss", type=float, default=0.0, help="share of what it does not see")
    parser.add_argument("--invent", type=float, default=0.0, help="share of what it makes up")
    arguments = parser.parse_args()
    judge = ToyJudge(cues=read_cues(arguments.cues), miss=arguments.miss, invent=arguments.invent)
    server = serve(judge, arguments.port)
    print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
