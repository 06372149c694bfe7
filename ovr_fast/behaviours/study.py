"""A study of behaviours: the responses of one model after another, and the judge's own errors."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Sequence as List
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec

from ovr_fast.behaviours import rates
from ovr_fast.behaviours.find import (
    BEHAVIOURS,
    COUNTERPARTS,
    BehaviourError,
    Finding,
    by_rules,
    read_cues,
)
from ovr_fast.behaviours.judge import by_judge
from ovr_fast.evaluation import made, records
from ovr_fast.evaluation.asking import Asker
from ovr_fast.evaluation.records import ResponseRecord

CORRECTABLE = 5.0
"""Mean length of responses, in that of the excerpts, up to which a share is corrected (the shipped
ones have 72 characters). Over longer responses false positives add up (of 30 near misses in a row,
cues that spare nine of ten alone spare hardly any): the correction would be of another judge."""
AGAIN = 10
"""Every so many responses are asked about twice."""
Response = tuple[str, int, str, str]
"""Question id, sample, question, response."""


class Finder(Protocol):
    """Rules, or a judge."""

    name: str

    def find(self, wanted: List[Response], behaviour: str, *, seed: int = 0) -> list[Finding]:
        """A behaviour in each response."""


class ByRules:
    """Cues of a file, or the shipped ones."""

    def __init__(self, cues: Path | None = None) -> None:
        self.name = f"rules ({cues.stem})" if cues else "rules"
        self._cues = read_cues(cues)

    def find(self, wanted: List[Response], behaviour: str, *, seed: int = 0) -> list[Finding]:
        """See ``by_rules``."""
        return [
            Finding(
                question=question, sample=sample, behaviour=behaviour,
                instances=by_rules(response, behaviour, self._cues),
            )
            for question, sample, _, response in wanted
        ]  # fmt: skip


class ByJudge:
    """A language model."""

    def __init__(self, asker: Asker) -> None:
        self.name, self._asker = asker.model, asker

    def find(self, wanted: List[Response], behaviour: str, *, seed: int = 0) -> list[Finding]:
        """See ``by_judge``."""
        return by_judge(self._asker, wanted, behaviour, seed=seed)


def find(
    finder: Finder,
    evaluations: List[Path],
    output: Path,
    benchmarks: List[str],
    data: Path | None,
    excerpts: Path | None = None,
) -> list[dict[str, Any]]:
    """Find all behaviours; ``behaviours.json`` and ``MODEL.jsonl`` in ``output``.

    Args:
        benchmarks: their names; empty means all that a folder has.
        data: the benchmarks' files, for the questions; None shows the finder none.
        excerpts: labelled, to correct its shares by; None: the shipped ones.

    Returns:
        the rows of ``behaviours.json``: a share of each behaviour and a rate of each pair, by
        model.

    Raises:
        BehaviourError: a folder holds no responses or not all, two have one name, ``excerpts``
            are none, or a judge fails; ``behaviours.json`` is then not written.
    """
    names = [folder.resolve().name for folder in evaluations]
    if len(set(names)) < len(names):
        raise BehaviourError(f"two folders have one name: {', '.join(names)}")
    errors = calibrate(finder, excerpts)
    rows: list[dict[str, Any]] = []
    for name, folder in zip(names, evaluations, strict=True):
        wanted = _responses(folder, benchmarks, data)
        found = {behaviour: finder.find(wanted, behaviour) for behaviour in BEHAVIOURS}
        again = wanted[::AGAIN] if isinstance(finder, ByJudge) else []
        flat = [finding for each in found.values() for finding in each]
        records.write_whole(
            output / f"{name}.jsonl",
            b"".join(msgspec.json.encode(finding) + b"\n" for finding in flat),
        )
        length = sum(len(response) for *_, response in wanted) / len(wanted)
        for behaviour, findings in found.items():
            row = _share(behaviour, findings, errors.get(behaviour), length)
            row |= {"responses": name, "judge": finder.name}
            if again:
                twice = finder.find(again, behaviour, seed=1)
                both = [
                    (bool(a.instances), bool(b.instances))
                    for a, b in zip(findings[::AGAIN], twice, strict=True)
                    if not (a.missing or b.missing)
                ]
                same, _, ac1 = rates.agreement([a for a, _ in both], [b for _, b in both])
                row |= {"self_agreement": same, "self_ac1": ac1}
            rows.append(row)
        for visual, linguistic in COUNTERPARTS.items():
            rows.append(
                {"responses": name, "judge": finder.name}
                | _transfer(visual, found[visual], linguistic, found[linguistic])
            )
    records.write_whole(output / "behaviours.json", msgspec.json.format(msgspec.json.encode(rows)))
    return rows


def _responses(folder: Path, benchmarks: List[str], data: Path | None) -> list[Response]:
    """The first response to the first question of each cluster: over several, which are alike, the
    intervals of shares and rates would hold the truth 79 % of the time, with four. Ids are of
    benchmark and question; clusters are known where the files or scores are there."""
    found: list[Response] = []
    adapters = {adapter.name: adapter for adapter in made.adapters(folder)}
    for name in benchmarks or sorted(adapters):
        if name not in adapters:
            raise BehaviourError(
                f"{folder} holds no responses to {name}; it has {', '.join(sorted(adapters))}"
            )
        if data is None:
            path = folder / "responses" / f"{name}.jsonl"
            manifest = records.read_manifest(path.with_suffix(".json"))
            responses = records.read_records(path, ResponseRecord)
            counts = Counter(record.question for record in responses)
            samples = manifest["settings"]["samples"]
            if not counts or set(counts.values()) != {samples}:
                raise BehaviourError(
                    f"{path}: {len(responses):,} responses, and not {samples} to each question; "
                    "run generate again, which makes those that are missing"
                )
            texts: dict[str, str] = {}
            scored = folder / "scores" / f"{name}.json"
            said = records.read_manifest(scored) if scored.is_file() else {}
            clusters: dict[str, str] = said.get("clusters") or {}
            if adapters[name].cluster and not clusters:
                raise BehaviourError(
                    f"{path}: questions of {name} belong together, and no scores say which; "
                    "score it (python -m ovr_fast.evaluate score), or give --data"
                )
        else:
            benchmark, _, responses = made.read(folder, adapters[name], data)
            texts = {q.id: "\n".join([q.text, *q.options]) for q in benchmark.questions}
            clusters = {q.id: q.cluster for q in benchmark.questions}
        firsts: dict[str, ResponseRecord] = {}
        for record in responses:
            if record.sample == 0:
                firsts.setdefault(clusters.get(record.question, record.question), record)
        found += [
            (f"{name}/{r.question}", r.sample, texts.get(r.question, ""), r.response)
            for r in firsts.values()
        ]
    if not found:
        raise BehaviourError(f"{folder} holds no responses")
    return found


def _share(
    behaviour: str, findings: List[Finding], errors: rates.Accuracy | None, length: float
) -> dict[str, Any]:
    read = [finding for finding in findings if not finding.missing]
    shown = sum(bool(finding.instances) for finding in read)
    rate = rates.share(shown, len(read))
    like = errors is not None and length <= CORRECTABLE * errors.characters
    fair = rates.corrected(shown, len(read), errors) if errors and like else None
    return {
        "kind": "share", "behaviour": behaviour, "traces": len(read), "shown": shown,
        "value": rate.value, "low": rate.low, "high": rate.high,
        "corrected": fair.value if fair else None,
        "corrected_low": fair.low if fair else None,
        "corrected_high": fair.high if fair else None,
        "mean_count": sum(len(finding.instances) for finding in read) / max(1, len(read)),
        "unfounded": sum(finding.unfounded for finding in read),
        "missing": len(findings) - len(read),
        "sensitivity": errors.sensitivity if errors else None,
        "specificity": errors.specificity if errors else None,
    }  # fmt: skip


def _transfer(
    visual: str, seen: List[Finding], linguistic: str, said: List[Finding]
) -> dict[str, Any]:
    pairs = [
        (bool(a.instances), bool(b.instances))
        for a, b in zip(seen, said, strict=True)
        if not (a.missing or b.missing)
    ]
    rate = rates.transfer([a for a, _ in pairs], [b for _, b in pairs])
    counts = {"visual": sum(a for a, _ in pairs), "linguistic": sum(b for _, b in pairs)}
    few = counts["linguistic"] < rates.FEW
    return {
        "kind": "transfer", "behaviour": f"{visual} / {linguistic}", "traces": len(pairs), **counts,
        "both": sum(a and b for a, b in pairs), "value": rate.value, "low": rate.low,
        "high": rate.high, "note": "not estimable: too few" if few else "",
    }  # fmt: skip


class Excerpts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Labelled texts of one behaviour."""

    shows: Annotated[list[str], msgspec.Meta(min_length=1)]
    near: Annotated[list[str], msgspec.Meta(min_length=1)]  # misses


def read_excerpts(path: Path | None = None) -> dict[str, Excerpts]:
    """The shipped ones by behaviour, or a file's, which may leave behaviours out.

    Raises:
        BehaviourError: the file is no TOML, or does not hold two lists of texts a behaviour.
    """
    source = path or files("ovr_fast.behaviours").joinpath("excerpts.toml")
    try:
        found = msgspec.convert(tomllib.loads(source.read_text()), type=dict[str, Excerpts])
    except (OSError, UnicodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise BehaviourError(f"{source}: {error}; see ovr_fast/behaviours/excerpts.toml") from error
    if unknown := set(found) - set(BEHAVIOURS):
        raise BehaviourError(
            f"{source}: no behaviours: {', '.join(sorted(unknown))}; there are "
            f"{', '.join(BEHAVIOURS)}"
        )
    return found


def calibrate(finder: Finder, excerpts: Path | None = None) -> dict[str, rates.Accuracy]:
    """Its errors on labelled excerpts, the shipped ones or a file's, by behaviour."""
    found = {}
    for behaviour, texts in read_excerpts(excerpts).items():
        shows, near = texts.shows, texts.near
        wanted = [(str(n), 0, "", text) for n, text in enumerate([*shows, *near])]
        findings = finder.find(wanted, behaviour)
        read = [[bool(f.instances) for f in part if not f.missing]
                for part in (findings[: len(shows)], findings[len(shows) :])]  # fmt: skip
        found[behaviour] = rates.Accuracy(
            sensitivity=sum(read[0]) / max(1, len(read[0])),
            specificity=1 - sum(read[1]) / max(1, len(read[1])),
            positives=len(read[0]),
            negatives=len(read[1]),
            characters=sum(map(len, [*shows, *near])) / (len(shows) + len(near)),
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of two studies on one behaviour in one model's responses."""

    responses: str
    behaviour: str
    common: int  # responses that both read
    same: float  # share of equal verdicts on whether it shows
    kappa: float
    ac1: float
    rank: float  # Spearman's correlation of the numbers of instances
    differing: list[tuple[str, str, str]]  # question, and what each quotes; "" where it sees none


def agreements(first: Path, second: Path) -> list[Agreement]:
    """How far two studies agree, by model and behaviour; empty where they have none in common."""
    found = []
    for path in sorted(first.glob("*.jsonl")):
        other = second / path.name
        if not other.is_file():
            continue
        a, b = _read(path), _read(other)
        for behaviour in BEHAVIOURS:
            common = [key for key in a if key in b and key[0] == behaviour]
            if not common:
                continue
            counts = [[len(each[key].instances) for key in common] for each in (a, b)]
            same, kappa, ac1 = rates.agreement(
                [n > 0 for n in counts[0]], [n > 0 for n in counts[1]]
            )
            found.append(
                Agreement(
                    responses=path.stem, behaviour=behaviour, common=len(common), same=same,
                    kappa=kappa, ac1=ac1, rank=rates.rank_correlation(*counts),
                    differing=[
                        (key[1], _quote(a[key]), _quote(b[key]))
                        for key in common
                        if bool(a[key].instances) != bool(b[key].instances)
                    ],
                )
            )  # fmt: skip
    return found


def agree(first: Path, second: Path) -> str:
    """How far two studies agree that a response shows a behaviour, as a table.

    Raises:
        BehaviourError: they have no response in common.
    """
    found = agreements(first, second)
    if not found:
        raise BehaviourError(f"{first} and {second} have no responses in common")
    lines = [
        "| responses | behaviour | equal | kappa | AC1 | rank correlation |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.responses} | {each.behaviour.replace('_', ' ')} | {each.same:.1%} | "
        f"{_number(each.kappa)} | {_number(each.ac1)} | {_number(each.rank)} |"
        for each in found
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _quote(finding: Finding) -> str:
    return finding.instances[0].quote if finding.instances else ""


def _read(path: Path) -> dict[tuple[str, str, int], Finding]:
    """What was found, but where the judge gave no answer, by behaviour, question and sample."""
    decoder = msgspec.json.Decoder(Finding)
    try:
        findings = [decoder.decode(line) for line in path.read_bytes().splitlines()]
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise BehaviourError(f"{path} is not a file of findings ({error})") from error
    return {(f.behaviour, f.question, f.sample): f for f in findings if not f.missing}


def table(rows: List[dict[str, Any]]) -> str:
    """Shares, then rates, for a terminal."""
    lines = [
        "| responses | behaviour | share | 95 % | corrected | a response | unfounded |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["kind"] == "share":
            lines.append(
                f"| {row['responses']} | {row['behaviour'].replace('_', ' ')} | "
                f"{_percent(row['value'])} | {_interval(row)} | "
                f"{corrected_text(row)} | {row['mean_count']:.2f} | "
                f"{row['unfounded']} |"
            )
    lines += [
        "",
        "| responses | transfer | rate | 95 % | visual / linguistic | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["kind"] == "transfer":
            lines.append(
                f"| {row['responses']} | {row['behaviour'].replace('_', ' ')} | "
                f"{_percent(row['value'])} | {_interval(row)} | {row['visual']} / "
                f"{row['linguistic']} of {row['traces']} | {row['note']} |"
            )
    return "\n".join(lines)


def corrected_text(row: dict[str, Any]) -> str:
    """A share's correction, with its interval where the study holds one; empty without any."""
    if row["corrected"] is None:
        return ""
    value, low = f"{row['corrected']:.1%}", row.get("corrected_low")
    return value if low is None else f"{value} ({low:.1%} to {row['corrected_high']:.1%})"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _interval(row: dict[str, Any]) -> str:
    return "" if math.isnan(row["low"]) else f"{row['low']:.1%} to {row['high']:.1%}"


def calibration_table(name: str, found: dict[str, rates.Accuracy]) -> str:
    """Sensitivity and specificity by behaviour."""
    lines = [f"| {name} | sensitivity | specificity |", "|---|---|---|"]
    for behaviour, errors in found.items():
        lines.append(
            f"| {behaviour.replace('_', ' ')} | {errors.sensitivity:.0%} | "
            f"{errors.specificity:.0%} |"
        )
    return "\n".join(lines)
