"""Benchmarks that a run measures between its steps: the first questions of each, one sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ovr_fast.config import Config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.images import image_limits
from ovr_fast.data.streams import RunData
from ovr_fast.evaluation.adapter import EvaluationError, load_adapter
from ovr_fast.evaluation.protocol import prompt_parts
from ovr_fast.evaluation.question import Benchmark, Question, load_benchmark
from ovr_fast.evaluation.records import ResponseRecord
from ovr_fast.evaluation.results import estimate, question_scores
from ovr_fast.evaluation.scoring import score_responses
from ovr_fast.records import ImageLimits, Prompt, Response


@dataclass(frozen=True, slots=True)
class AskedBenchmark:
    """A benchmark and its questions as the run's servers are asked them."""

    benchmark: Benchmark
    prompts: tuple[Prompt, ...]

    def metrics(self, responses: list[Response], *, workers: int) -> dict[str, float]:
        """Score, shares and mean length of one response a question; no judge is asked.

        Args:
            responses: in the order of the prompts.
            workers: processes that compare mathematics.
        """
        questions = self.benchmark.questions
        made = [
            ResponseRecord(
                question=questions[response.prompt_index].id,
                sample=0,
                seed=0,
                prompt_sha256="",
                order=(),
                response=response.text,
                finish_reason=response.finish_reason,
                prompt_tokens=len(response.prompt_tokens),
                response_tokens=len(response.response_tokens),
            )
            for response in responses
        ]
        scores = score_responses({q.id: q for q in questions}, made, workers=workers)
        found = estimate(self.benchmark, question_scores(self.benchmark, scores))
        count = len(scores)
        score = found["score"]
        return {
            "accuracy": score.value,
            **({} if math.isnan(score.error) else {"error": score.error}),
            "no_answer": sum(score.outcome == "no_answer" for score in scores) / count,
            "undecided": sum(score.outcome == "undecided" for score in scores) / count,
            "length_tokens": sum(record.response_tokens for record in made) / count,
        }


def read_benchmarks(config: Config, data: RunData) -> dict[str, AskedBenchmark]:
    """The benchmarks of ``evaluation.benchmarks`` by their names. A collective.

    Raises:
        EvaluationError: files that do not fit, a prompt over ``rl.max_prompt_tokens``, or a name
            that a held-out set has too.
    """
    found: dict[str, AskedBenchmark] = {}
    taken = {source.name or Path(source.path).stem for source in config.evaluation.sources}
    for name in config.evaluation.benchmarks:
        asked, limits = data.on_first_rank(partial(_read, name, config, data.chat))
        known = asked.benchmark.adapter.name
        if known in taken:
            raise EvaluationError(f"evaluation.benchmarks: two held-out sets are called {known!r}")
        taken.add(known)
        found[known] = asked
        data.limits.append(limits)
        data.said.append(
            f"{known}: {len(asked.prompts):,} questions of "
            f"{', '.join(file.name for file in asked.benchmark.files)}"
        )
    return found


def _read(name: str, config: Config, chat: ChatTemplate) -> tuple[AskedBenchmark, ImageLimits]:
    evaluation, limit = config.evaluation, config.rl.max_prompt_tokens
    benchmark = load_benchmark(
        load_adapter(name),
        Path(evaluation.benchmark_data),
        limit=evaluation.benchmark_questions,
    )
    kinds = {question.kind for question in benchmark.questions}
    if judged := kinds & {"judged", "graded"}:
        raise EvaluationError(
            f"evaluation.benchmarks: {benchmark.adapter.name} is {judged.pop()} by a judge, which "
            "a run does not ask; measure its exports with python -m ovr_fast.evaluate"
        )
    prompts = [_prompt(question, benchmark) for question in benchmark.questions]
    for prompt in prompts:
        placed = chat.render(prompt.messages, generation_prompt=True)
        if (tokens := len(chat.expand(placed, prompt.images))) > limit:
            raise EvaluationError(
                f"{benchmark.adapter.name}: question {prompt.id} has {tokens:,} tokens, over "
                f"rl.max_prompt_tokens={limit:,}; raise it"
            )
    return AskedBenchmark(benchmark, tuple(prompts)), image_limits(prompts, chat.image_processor)


def _prompt(question: Question, benchmark: Benchmark) -> Prompt:
    content: list[dict] = []
    images = []
    for part in prompt_parts(question, benchmark.adapter, "ours"):
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image"})
            images.append(question.images[part])
    return Prompt(
        id=question.id,
        data_source=benchmark.adapter.name,
        messages=({"role": "user", "content": content},),
        images=tuple(images),
        answer=question.answer,
        response=None,
    )
