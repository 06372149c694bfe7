"""The folder of a released model: weights, card, results, dynamics, what it was trained with."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Sequence as List
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ovr_fast.average import average
from ovr_fast.evaluation import records
from ovr_fast.model.hf_weights import HFReader, parameter_table
from ovr_fast.release.about import About, ReleaseError
from ovr_fast.release.privacy import leaks, scrubbed
from ovr_fast.report.page import write_report
from ovr_fast.report.runs import Run, read_json, read_run
from ovr_fast.shape.model_shape import read_shape

USED = ("benchmark", "score", "sampling_error", "questions", "samples", "protocol",
        "response_tokens")  # fmt: skip
STUDIED = ("kind", "behaviour", "responses", "judge", "value", "low", "high")
"""What is read of each result, and of each share or rate."""


def release(
    models: List[Path], run: Path, output: Path, about: About, *, evaluations: List[Path] = (),
    behaviours: List[Path] = (),
) -> Path:  # fmt: skip
    """Make the folder; whole or not there.

    Args:
        models: Hugging Face folders whose weights are averaged.
        run: folder of the run they came from.
        evaluations: scored folders of ``ovr_fast.evaluate``; scores and protocols are published,
            no question and no response.
        behaviours: folders of ``ovr_fast.behaviours``; rates are published, no quote.

    Raises:
        ReleaseError: ``output`` exists, or a file would tell of this machine.
        ModelError: the models cannot be averaged.
        ReportError: a folder does not hold what it should.
    """
    if output.exists():
        raise ReleaseError(f"{output} exists; remove it or choose another --output")
    read_run(run)
    scored = [
        (folder.resolve().name, read_json(folder, "results.json", USED)) for folder in evaluations
    ]
    studied = [
        row for folder in behaviours
        for row in read_json(folder, "behaviours.json", STUDIED)
    ]  # fmt: skip
    measured = sorted({row["benchmark"] for _, results in scored for row in results})
    if unknown := [name for name in about.evaluations if name not in measured]:
        raise ReleaseError(
            f"release.toml has evaluations.{unknown[0]}, which nothing measured: "
            + (f"there are {', '.join(measured)}" if scored else "name its folder as --evaluation")
        )
    if cut := [str(model) for model in models if model.name.endswith((".partial", ".old"))]:
        raise ReleaseError(f"{cut[0]} was not finished when its run was killed; leave it out")
    output.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    partial = place / "release"
    try:
        average(models, partial)
        _forget_names(partial)
        check_average(models, partial)
        with tempfile.TemporaryDirectory() as scratch:
            public = _public_run(run, Path(scratch))
            write_report(
                [public], partial / "report", evaluations=evaluations, behaviours=behaviours,
                title=about.name, quotes=False,
            )  # fmt: skip
            _training(public, models, partial / "training")
            found = read_run(public)
        _dynamics(found, studied, partial / "dynamics")
        for name, results in scored:
            _evaluation(name, results, evaluations, partial / "evaluation")
        _eval_results(scored, about, partial / ".eval_results")
        _licences(about, partial)
        (partial / "README.md").write_text(_card(about, found, models, scored, studied, partial))
        _check_loads(partial)
        if leaking := list(leaks(partial)):
            raise ReleaseError(f"would publish a name or a path of this machine: {leaking[0]}")
        _sums(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return output


def _forget_names(folder: Path) -> None:
    """Take out of ``config.json`` where the model once was."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def check_average(models: List[Path], folder: Path) -> None:
    """Read every tensor again, and compare with the mean.

    Raises:
        ReleaseError: one is not it.
    """
    readers, made = [HFReader(model) for model in models], HFReader(folder)
    for row in parameter_table(read_shape(folder), 1, value_head=False):
        for part in row.tensors:
            found = made.read(part, 0, 1)
            total = readers[0].read(part, 0, 1).float()
            for reader in readers[1:]:
                total = total + reader.read(part, 0, 1).float()
            if not torch.equal(found, (total / len(readers)).to(found.dtype)):
                raise ReleaseError(f"{folder}: {part.name} is not what was written; is a disk bad?")


def _public_run(run: Path, scratch: Path) -> Path:
    """The run without what is this machine's, for the report and for ``training/``; without its
    samples too, which are of somebody's data."""
    public = scratch / scrubbed(run.resolve().name)
    public.mkdir()
    shutil.copyfile(run / "metrics.jsonl", public / "metrics.jsonl")
    (public / "config.toml").write_text(scrubbed((run / "config.toml").read_text()))
    environment = json.loads((run / "env.json").read_text()) if (run / "env.json").exists() else {}
    kept = {key: value for key, value in environment.items() if key != "command"}
    (public / "env.json").write_text(scrubbed(json.dumps(kept, indent=1)) + "\n")
    return public


def _training(public: Path, models: List[Path], folder: Path) -> None:
    folder.mkdir()
    for name in ("config.toml", "env.json"):
        shutil.copyfile(public / name, folder / name)
    rows = [
        {"name": model.resolve().name, "sha256": {
            path.name: _digest(path) for path in sorted(model.glob("*.safetensors"))
        }} for model in models
    ]  # fmt: skip
    (folder / "averaged_from.json").write_text(json.dumps(rows, indent=1) + "\n")


def _dynamics(run: Run, studied: List[dict[str, Any]], folder: Path) -> None:
    """A row a step of all metrics, and a row of each share and rate, as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    names = list(dict.fromkeys(key for row in run.rows for key in row))
    columns = {name: [row.get(name) for row in run.rows] for name in names}
    pq.write_table(pa.table(columns), folder / "metrics.parquet")
    if studied:
        names = list(dict.fromkeys(key for row in studied for key in row))
        columns = {name: [row.get(name) for row in studied] for name in names}
        pq.write_table(pa.table(columns), folder / "behaviours.parquet")


def _evaluation(
    name: str, results: List[dict[str, Any]], evaluations: List[Path], folder: Path
) -> None:
    """Scores of a model and the protocols they were made with."""
    (folder / "protocols").mkdir(parents=True, exist_ok=True)
    records.write_whole(folder / f"{name}.json", (json.dumps(results, indent=1) + "\n").encode())
    source = next(each for each in evaluations if each.resolve().name == name)
    for row in results:
        path = source / "responses" / f"{row['benchmark']}.json"
        manifest = records.read_manifest(path)
        about = {key: manifest[key] for key in ("protocol", "settings", "files", "adapter")}
        target = folder / "protocols" / f"{row['benchmark']}-{row['protocol']}.json"
        target.write_text(scrubbed(json.dumps(about, indent=1, sort_keys=True)) + "\n")


def _eval_results(
    scored: List[tuple[str, list[dict[str, Any]]]], about: About, folder: Path
) -> None:
    """What model pages read: only of benchmarks whose data set and task ``release.toml`` names, and
    of the last evaluation named, which is the released model's."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    if not scored:
        return
    for row in scored[-1][1]:
        if (task := about.evaluations.get(row["benchmark"])) is None:
            continue
        score = row["score"]
        if score["value"] is None:
            continue
        # MME's is a sum of points; all others are shares.
        scale = 1 if score["value"] > 1 else 100
        error = score["error"]
        known = error is not None and math.isfinite(error)
        note = f"standard error {scale * error:.2f}" if known else "no standard error"
        entry = EvalResultEntry(
            dataset_id=task["dataset"],
            task_id=task["task"],
            value=round(scale * score["value"], 2),
            notes=f"{note} over {row['questions']} questions, {row['samples']} samples each; "
            f"protocol {row['protocol']} in evaluation/",
        )
        folder.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        (folder / f"{row['benchmark']}.yaml").write_text(text)


def _licences(about: About, folder: Path) -> None:
    licence = folder / "LICENSE"
    if licence.exists():  # of the model that was trained
        licence.rename(folder / "LICENSE.base")
    if about.licence.lower() == "apache-2.0":
        licence.write_text(_apache())
    elif about.licence_file:
        licence.write_text(Path(about.licence_file).read_text())
    else:
        raise ReleaseError(f"licence_file is missing: the text of {about.licence}")
    lines = [f"{about.name}: {about.licence}", f"made from {about.base}: {about.base_licence}"]
    lines += [f"trained on {row['name']}: {row['licence']}" for row in about.data]
    notice = folder / "NOTICE"
    before = notice.read_text().rstrip() + "\n\n" if notice.exists() else ""
    notice.write_text(before + "\n".join(lines) + "\n")


def _apache() -> str:
    return files("ovr_fast.release").joinpath("apache-2.0.txt").read_text()


def _card(
    about: About, run: Run, models: List[Path], scored: List[tuple[str, list[dict[str, Any]]]],
    studied: List[dict[str, Any]], folder: Path,
) -> str:  # fmt: skip
    import jinja2
    from huggingface_hub import ModelCard, ModelCardData

    def number(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return ""
        return f"{value:.3g}" if abs(value) <= 1 else f"{value:,.1f}"

    results = [
        {"benchmark": row["benchmark"], "model": name, "score": number(row["score"]["value"]),
         "error": number(row["score"]["error"]), "sampling": number(row["sampling_error"]),
         "questions": row["questions"], "protocol": row["protocol"]}
        for name, rows in scored for row in rows
    ]  # fmt: skip
    rates = [
        {"behaviour": row["behaviour"].replace("_", " "), "responses": row["responses"],
         "rate": number(row["value"]) or row["note"],
         "interval": f"{number(row['low'])} to {number(row['high'])}" if row["low"] else "",
         "counts": f"{row['visual']} / {row['linguistic']} of {row['traces']}"}
        for row in studied if row["kind"] == "transfer"
    ]  # fmt: skip
    licence = about.licence.lower()
    data = ModelCardData(
        license=licence if not licence.startswith("other") else "other",
        license_name=about.licence if licence.startswith("other") else None,
        base_model=about.base if about.base.count("/") == 1 else None,
        library_name="transformers", pipeline_tag="image-text-to-text",
        tags=["reasoning", "reinforcement-learning", "ovr_fast"], model_name=about.name,
    )  # fmt: skip
    source = files("ovr_fast.release").joinpath("card.md.j2").read_text()
    body = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(source).render(
        about=about, commit=(run.environment.get("commit") or "unknown")[:12],
        averaged=[model.resolve().name for model in models],
        results=results, behaviours=rates, training=_recipe(run),
        sampling=json.loads((folder / "generation_config.json").read_text()),
    )  # fmt: skip
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    return str(card)


def _steps(rl: dict[str, Any]) -> str:
    """How a batch of rollouts was trained on. (Runs of earlier versions had a critic and PPO.)"""
    objective = rl.get("objective", "ppo")
    if rl.get("advantage", "gae") == "group":
        scale = "" if rl["group_scale"] == "none" else ", divided by its standard deviation"
        baseline = {"mean": "the group's mean", "leave_one_out": "the mean of the others"}
        return (
            f"{rl['policy_steps']} policy steps each by {objective} ({rl['normalization']}); no "
            f"critic: rewards against {baseline[rl['group_baseline']]}{scale}; learning rate "
            f"{rl['actor']['lr']:g}"
        )
    return (
        f"{rl['policy_steps']} policy and {rl['critic_steps']} critic steps each by {objective}; "
        f"learning rates {rl['actor']['lr']:g} and {rl['critic']['lr']:g}"
    )


def _recipe(run: Run) -> list[str]:
    """The recipe in lines, of the settings that were used."""
    config, lines = run.config, []
    done: dict[str, int] = {}
    for row in run.rows:
        done[row["stage"]] = row["step"]
    if steps := done.get("cold_start"):
        cold = config["cold_start"]
        lines.append(
            f"cold start: {steps} steps of {cold['rows_per_step']} rows of {cold['row_tokens']} "
            f"tokens, learning rate {cold['optimizer']['lr']:g}"
        )
    if steps := done.get("rl"):
        rl = config["rl"]
        lines.append(
            f"RL: {steps} steps of {rl['prompts_per_step']} prompts x {rl['samples_per_prompt']} "
            f"samples, responses of at most {rl['max_response_tokens']} tokens, "
            f"{_steps(rl)}"
        )
    lines.append(f"vision tower: {config['model']['train_vision']}; {config['model']['dtype']}")
    hours, world = run.hours().get("step", 0.0), run.environment.get("world", 1)
    devices = run.environment.get("devices") or [f"{run.environment.get('cpus', '?')} CPU cores"]
    lines.append(f"{hours:.3g} hours, {world} rank{'s' * (world > 1)} on {devices[0]}")
    return lines


def _check_loads(folder: Path) -> None:
    """Configuration, tokenizer and chat template load where no network is.

    Raises:
        ReleaseError: one does not.
    """
    from huggingface_hub import ModelCard
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True)
        AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ModelCard.load(folder / "README.md")
    except Exception as error:  # whatever a library raises on a bad file
        raise ReleaseError(f"the released folder does not load: {error}") from error


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sums(folder: Path) -> None:
    lines = [
        f"{_digest(path)}  {path.relative_to(folder)}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
