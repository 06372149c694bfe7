"""Benchmarks: responses, scores with their errors, comparisons, and checks of the files.

    python -m ovr_fast.evaluate check    --data DIR --benchmarks mathvision_mini,aime24
    python -m ovr_fast.evaluate generate --data DIR --benchmarks ... --output OUT --model HF_FOLDER
    python -m ovr_fast.evaluate score    --data DIR --output OUT [--judge URL --judge-model NAME]
    python -m ovr_fast.evaluate compare  OUT_A OUT_B
    python -m ovr_fast.evaluate export   --to lmms-eval --task NAME --data DIR --output OUT ...

Files are the user's copies of the official ones (``evaluation/adapters/*.toml`` name them);
nothing is downloaded. Generation and scoring are two steps: a response is made once, and may be
scored again. Both go on where they were when they are started again after a kill.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence as List
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from ovr_fast.errors import OVRFastError
from ovr_fast.evaluation import comparison, contamination, exports, made, records, results
from ovr_fast.evaluation.adapter import EvaluationError, adapter_of, load_adapter, shipped
from ovr_fast.evaluation.generate import digest_of, generate, given, started
from ovr_fast.evaluation.judge import Judge
from ovr_fast.evaluation.protocol import PRESETS, Protocol
from ovr_fast.evaluation.question import Benchmark, load_benchmark
from ovr_fast.evaluation.scoring import score_responses
from ovr_fast.rollout.client import Client


def check_files(arguments: argparse.Namespace) -> None:
    """What the files hold, and which of their questions training files hold too."""
    training = contamination.read_training(arguments.against) if arguments.against else None
    responses = 0
    for name in arguments.benchmarks:
        benchmark = load_benchmark(load_adapter(name), arguments.data)
        questions = benchmark.questions
        responses += len(questions) * benchmark.adapter.samples
        kinds = Counter(question.kind for question in questions)
        images = sum(len(question.images) for question in questions)
        print(
            f"{benchmark.adapter.name}: {len(questions):,} questions in "
            f"{len({q.cluster for q in questions}):,} clusters ("
            f"{', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())}), "
            f"{images:,} pictures; licence {benchmark.adapter.licence or 'not said'}"
        )
        for file in benchmark.files:
            print(f"  {file} sha256 {digest_of(file)}")
        if training is not None:
            _print_seen(benchmark, contamination.find(list(questions), training), training.rows)
    print(f"{responses:,} responses at the adapters' numbers of samples")


def _print_seen(benchmark: Benchmark, found: List[contamination.Found], rows: int) -> None:
    seen = [each for each in found if each.seen]
    near = [each for each in found if not each.seen]
    print(
        f"  {len(seen):,} of its questions stand in the {rows:,} training rows "
        f"({sum(e.picture == 'same' for e in seen):,} by their picture, "
        f"{sum(e.text_share >= contamination.SHARE for e in seen):,} by their text); "
        f"{len(near):,} pictures look like one there"
    )
    for each in [*seen, *near][:20]:
        print(f"    {each.question}: picture {each.picture or '-'}, text {each.text_share:.0%}")


def make_responses(arguments: argparse.Namespace) -> None:
    """Generate, benchmark by benchmark."""
    preset = PRESETS[arguments.preset]
    protocol = Protocol(
        style=arguments.style,
        temperature=preset["temperature"],
        top_p=preset["top_p"],
        samples=arguments.samples,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    benchmarks = [
        load_benchmark(load_adapter(name), arguments.data, limit=arguments.limit)
        for name in arguments.benchmarks
    ]
    client = Client()
    endpoint = None
    try:
        if arguments.url:
            if not arguments.model_name:
                raise EvaluationError("--url needs --model-name, the model's name there")
            endpoint = given(
                arguments.url, arguments.model_name, vllm=not arguments.openai_settings_only
            )
        else:
            endpoint = started(
                arguments.model,
                client,
                benchmarks,
                protocol,
                log=arguments.output / "vllm.log",
                dtype=arguments.dtype,
                tensor=arguments.tensor,
                kv_cache_gib=arguments.kv_cache_gib,
                devices=arguments.devices,
                timeout_s=arguments.startup_timeout_s,
            )
        for benchmark in benchmarks:
            print(
                f"{benchmark.adapter.name}: protocol {protocol.digest(benchmark.adapter)}, "
                f"{len(benchmark.questions):,} questions x "
                f"{protocol.of(benchmark.adapter).samples} samples",
                flush=True,
            )
            generate(
                benchmark,
                endpoint,
                client,
                protocol,
                output=arguments.output,
                limit=arguments.limit,
                parallel=arguments.parallel,
                timeout_s=arguments.timeout_s,
            )
    except* OVRFastError as group:  # of the requests, which end together
        raise _first(group) from None
    finally:
        if endpoint is not None:
            endpoint.close()
        client.close()


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def score(arguments: argparse.Namespace) -> None:
    """Score what generate has made, and print the table."""
    output: Path = arguments.output
    adapters = [load_adapter(name) for name in arguments.benchmarks] or made.adapters(output)
    judge = None
    if arguments.judge:
        if not arguments.judge_model:
            raise EvaluationError("--judge needs --judge-model, the model's name there")
        judge = Judge(arguments.judge, arguments.judge_model, output / "judge.jsonl")
    training = contamination.read_training(arguments.against) if arguments.against else None
    found = []
    try:
        for adapter in adapters:
            benchmark, manifest, responses = made.read(output, adapter, arguments.data)
            by_name = {question.id: question for question in benchmark.questions}
            scores = score_responses(by_name, responses, workers=arguments.workers)
            if judge is not None:
                scores = _judged(judge, by_name, responses, scores)
            path = output / "scores" / f"{benchmark.adapter.name}.jsonl"
            records.write_whole(path.with_suffix(".json"), as_json({
                "judge": judge.model if judge else None, "adapter": msgspec.to_builtins(adapter),
                "clusters": {q.id: q.cluster for q in benchmark.questions if q.cluster != q.id},
            }))  # fmt: skip
            records.write_records(path, scores)
            if adapter != adapter_of(manifest):
                print(f"{adapter.name}: scored with another adapter than it was asked with")
            result = results.summarize(benchmark, responses, scores)
            result |= {
                "protocol": manifest["protocol"],
                "model": manifest["model"],
                "limit": manifest["limit"],
                "judge": judge.model if judge else None,
            }
            if training is not None:
                seen = {
                    f.question
                    for f in contamination.find(list(benchmark.questions), training)
                    if f.seen
                }
                result["clean"] = _clean(benchmark, scores, seen)
            found.append(result)
    finally:
        if judge is not None:
            judge.close()
    _merge(output / "results.json", found)
    print(results.table(found))
    for result in found:
        if "clean" in result:
            clean = result["clean"]
            print(
                f"{result['benchmark']}: {100 * clean['score']:.1f} on the {clean['questions']:,} "
                "questions that no training row holds"
            )


def _merge(path: Path, found: List[dict[str, Any]]) -> None:
    """With the results of benchmarks that were scored before."""
    before = msgspec.json.decode(path.read_bytes()) if path.is_file() else []
    named = {result["benchmark"]: result for result in [*before, *found]}
    records.write_whole(path, as_json([named[name] for name in sorted(named)]))


def _clean(
    benchmark: Benchmark, scores: List[records.ScoreRecord], seen: set[str]
) -> dict[str, Any]:
    """The score of the clusters that hold no question which training has seen."""
    dropped = {question.cluster for question in benchmark.questions if question.id in seen}
    left = [question for question in benchmark.questions if question.cluster not in dropped]
    if not left:
        return {"questions": 0, "score": float("nan")}
    part = replace(benchmark, questions=tuple(left))
    names = {question.id for question in left}
    kept = [each for each in scores if each.question in names]
    worth = results.question_scores(part, kept)
    return {"questions": len(left), "score": results.estimate(part, worth)["score"].value}


def _judged(
    judge: Judge,
    questions: dict[str, Any],
    responses: List[records.ResponseRecord],
    scores: List[records.ScoreRecord],
) -> list[records.ScoreRecord]:
    """With the judge's verdicts in place of what is undecided."""
    open_ones = [
        (questions[r.question], r, s)
        for r, s in zip(responses, scores, strict=True)
        if s.outcome == "undecided"
    ]
    decided = {each.key: each for each in judge.decide(open_ones)} if open_ones else {}
    return [decided.get(each.key, each) for each in scores]


def compare(arguments: argparse.Namespace) -> None:
    """Two evaluations, question by question."""
    found = comparison.compare(arguments.first, arguments.second)
    print("| benchmark | first | second | difference | 95 % interval | p (Holm) | better · worse | "
          "it could show |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for each in found:
        by = each.difference
        print(
            f"| {each.what} | {100 * each.first:.1f} | {100 * each.second:.1f} | "
            f"{100 * by.value:+.1f} | {100 * by.low:+.1f} to {100 * by.high:+.1f} | "
            f"{_p(by.p)} ({_p(each.p_corrected)}) | {by.wins} · {by.losses} | "
            f"{100 * by.smallest:.1f} |"
        )
    for each in found:
        if each.first_open or each.second_open:
            print(
                f"{each.benchmark}: {each.first_open:.1%} and {each.second_open:.1%} of the "
                "answers are undecided, and count as wrong"
            )
    if arguments.json:
        rows = [{"benchmark": each.what, **asdict(each.difference)} for each in found]
        records.write_whole(arguments.json, as_json(rows))


def export(arguments: argparse.Namespace) -> None:
    """Responses in another harness's files."""
    (name,) = arguments.benchmarks if len(arguments.benchmarks) == 1 else (None,)
    if name is None:
        raise EvaluationError("export writes one benchmark: name it with --benchmarks")
    benchmark, manifest, responses = made.read(arguments.output, load_adapter(name), arguments.data)
    written = exports.write(
        exports.Responses(benchmark=benchmark, manifest=manifest, records=responses),
        to=arguments.to,
        task=arguments.task,
        model=arguments.model_name,
        folder=arguments.folder,
        sample=arguments.sample,
        rows=arguments.rows,
        on=arguments.on,
        whole_split=arguments.whole_split,
    )
    print(written.path)
    print(written.says)


def as_json(found: Any) -> bytes:
    """With null where a number is not known."""
    return msgspec.json.format(msgspec.json.encode(found), indent=1)


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog="python -m ovr_fast.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=run)
        return made

    def benchmarks(made: argparse.ArgumentParser, *, required: bool) -> None:
        made.add_argument("--data", type=Path, required=True, help="folder of official files")
        made.add_argument(
            "--benchmarks",
            type=lambda text: [name for name in text.split(",") if name],
            required=required,
            default=[],
            help=f"names or TOML files, with commas; shipped: {', '.join(shipped())}",
        )

    made = command("check", check_files, "read the files without a model")
    benchmarks(made, required=True)
    made.add_argument("--against", action="append", default=[], help="training file; repeatable")

    made = command("generate", make_responses, "sample responses")
    benchmarks(made, required=True)
    made.add_argument("--output", type=Path, required=True)
    who = made.add_mutually_exclusive_group(required=True)
    who.add_argument("--model", type=Path, help="Hugging Face folder; vLLM is started for it")
    who.add_argument("--url", help="OpenAI-compatible address")
    made.add_argument("--model-name", default="", help="the model's name at --url")
    made.add_argument(
        "--openai-settings-only",
        action="store_true",
        help="for a --url that refuses repetition_penalty and top_k",
    )
    made.add_argument("--style", choices=("ours", "official"), default="ours")
    made.add_argument("--preset", choices=sorted(PRESETS), default="trained")
    made.add_argument("--samples", type=int, default=0, help="a question; 0: the adapter's")
    made.add_argument("--max-tokens", type=int, default=0, help="a response; 0: the adapter's")
    made.add_argument("--limit", type=int, default=0, help="first questions alone")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--parallel", type=int, default=64, help="requests at a time")
    made.add_argument("--timeout-s", type=float, default=7200.0, help="of a response")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    made.add_argument("--tensor", type=int, default=1, help="GPUs of the server")
    made.add_argument("--devices", default=None, help="CUDA_VISIBLE_DEVICES of the server")
    made.add_argument("--kv-cache-gib", type=int, default=1, help="of a server on a CPU")
    made.add_argument("--startup-timeout-s", type=float, default=600.0)

    made = command("score", score, "score responses and print the table")
    benchmarks(made, required=False)
    made.add_argument("--output", type=Path, required=True, help="what generate wrote")
    made.add_argument("--judge", default="", help="OpenAI-compatible address, for the undecided")
    made.add_argument("--judge-model", default="")
    made.add_argument("--workers", type=int, default=2, help="processes that compare mathematics")
    made.add_argument("--against", action="append", default=[], help="training file; repeatable")

    made = command("compare", compare, "two evaluations, question by question")
    made.add_argument("first", type=Path)
    made.add_argument("second", type=Path)
    made.add_argument("--json", type=Path)

    made = command("export", export, "responses for another harness's scorer")
    benchmarks(made, required=True)
    made.add_argument("--output", type=Path, required=True, help="what generate wrote")
    made.add_argument("--to", choices=exports.HARNESSES, required=True)
    made.add_argument("--task", required=True, help="its name there, such as MathVista_MINI")
    made.add_argument("--model-name", default="ovr_fast", help="as the files name it")
    made.add_argument("--folder", type=Path, required=True, help="for the files")
    made.add_argument("--sample", type=int, default=0, help="which of a question's, where one fits")
    made.add_argument(
        "--whole-split", action="store_true",
        help="of a set that is a part of its files: its rows have their numbers among all of them",
    )  # fmt: skip
    made.add_argument("--rows", type=Path, help="VLMEvalKit's own TSV of the task")
    made.add_argument("--on", default="", help="its column that names our questions")
    return whole


def main() -> None:
    arguments = parser().parse_args()
    least = {"samples": 0, "max_tokens": 0, "limit": 0, "parallel": 1, "workers": 1, "tensor": 1}
    for name, value in least.items():
        if getattr(arguments, name, value) < value:
            sys.exit(f"ovr_fast.evaluate: --{name.replace('_', '-')} must be at least {value}")
    try:
        arguments.run(arguments)
    except OVRFastError as error:
        sys.exit(f"ovr_fast.evaluate: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("ovr_fast.evaluate: stopped; start it again with the same words to go on")


if __name__ == "__main__":
    main()
