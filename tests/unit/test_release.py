"""A released folder: whole or not there, what it holds, and what it must not."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from ovr_fast.errors import ModelError
from ovr_fast.release import folder as making
from ovr_fast.release.about import ReleaseError, read_about
from ovr_fast.release.folder import release
from ovr_fast.release.privacy import leaks, scrubbed
from support.toy_run import BASE_MODEL

UNMEASURED = """
name = "someone/toy"
base = "a/base"
base_licence = "apache-2.0"
licence = "apache-2.0"

[[data]]
name = "ours"
licence = "cc0-1.0"
"""
ABOUT = (
    UNMEASURED
    + """
[evaluations.aime24]
dataset = "a/aime"
task = "aime24"
"""
)


def an_about(folder: Path, text: str = ABOUT) -> Path:
    path = folder / "release.toml"
    path.write_text(text)
    return path


def a_run(folder: Path, **environment: str | None) -> Path:
    """A run's folder with what a release reads."""
    folder.mkdir()
    rows = [
        {"stage": "cold_start", "step": 3, "cold_start/loss": 1.0, "time/step_s": 3600.0},
        {"stage": "rl", "step": 2, "rollout/reward": 0.5, "time/step_s": 3600.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rollouts.jsonl").write_text(
        json.dumps({"stage": "rl", "step": 2, "response": "a secret question"}) + "\n"
    )
    from ovr_fast.config import load_config
    from ovr_fast.settings import to_toml

    config = load_config(Path("configs/tiny.toml"), [f"model.path={folder}/model"])
    (folder / "config.toml").write_text(to_toml(config, described=True))
    about = {"command": [str(folder / "train.py")], "commit": "abc", "world": 1, **environment}
    (folder / "env.json").write_text(json.dumps(about))
    return folder


def an_evaluation(folder: Path) -> Path:
    """Scored, with one response that nobody may publish."""
    score = {"value": 0.5, "error": 0.1, "low": 0.3, "high": 0.7, "clusters": 30}
    result = {"benchmark": "aime24", "questions": 30, "samples": 2, "score": score,
              "sampling_error": 0.05, "response_tokens": 9.0, "protocol": "abc"}  # fmt: skip
    (folder / "responses").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps([result]))
    (folder / "responses/aime24.jsonl").write_text('{"response": "a secret response"}\n')
    manifest = {"protocol": "abc", "settings": {"samples": 2}, "files": {"x.jsonl": "d"},
                "adapter": {"name": "aime24"}}  # fmt: skip
    (folder / "responses/aime24.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the mean of two models."""
    place = tmp_path_factory.mktemp("release")
    other = place / "rl_000002"
    shutil.copytree(BASE_MODEL, other)
    weights = load_file(other / "model.safetensors")
    weights = {name: 2 * tensor for name, tensor in weights.items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    base = json.loads((other / "generation_config.json").read_text())
    penalized = {**base, "repetition_penalty": 1.05}
    (other / "generation_config.json").write_text(json.dumps(penalized))
    study = place / "study"
    study.mkdir()
    rate = {"kind": "transfer", "responses": "model", "judge": "rules", "behaviour": "a / b",
            "value": 0.25, "low": 0.1, "high": 0.4, "visual": 1, "linguistic": 4, "both": 1,
            "traces": 30, "note": "not estimable: too few"}  # fmt: skip
    (study / "behaviours.json").write_text(json.dumps([rate]))
    return release(
        [other, BASE_MODEL], a_run(place / "run"), place / "out", read_about(an_about(place)),
        evaluations=[an_evaluation(place / "model")], behaviours=[study],
    )  # fmt: skip


def test_the_weights_are_the_mean(released: Path) -> None:
    base, found = (
        load_file(BASE_MODEL / "model.safetensors"),
        load_file(released / "model.safetensors"),
    )
    assert set(found) == set(base)
    for name, tensor in base.items():
        assert torch.equal(found[name], (1.5 * tensor.float()).to(tensor.dtype))


def test_it_samples_as_the_policy_was_trained(released: Path) -> None:
    settings = json.loads((released / "generation_config.json").read_text())
    assert settings["repetition_penalty"] == 1.0
    assert settings["temperature"] == settings["top_p"] == 1.0


def test_the_card_says_what_it_is(released: Path) -> None:
    text = (released / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert (data["license"], data["base_model"]) == ("apache-2.0", "a/base")
    assert data["pipeline_tag"] == "image-text-to-text"
    assert "| aime24 | model | 0.5 | 0.1 | 0.05 | 30 | abc |" in body
    assert "| a / b | model | 0.25 | 0.1 to 0.4 | 1 / 4 of 30 |" in body
    assert "uniform average of 2 exports (rl_000002, base_model)" in body
    assert "RL: 2 steps of 16 prompts x 8 samples" in body
    assert "ours (cc0-1.0)" in body
    assert "trained on ours: cc0-1.0" in (released / "NOTICE").read_text()
    assert "Apache License" in (released / "LICENSE").read_text()


def test_the_card_of_a_run_without_a_critic_names_none() -> None:
    rl = {"policy_steps": 2, "critic_steps": 4, "actor": {"lr": 1e-6}, "advantage": "group",
          "objective": "gspo", "normalization": "sequence_mean", "group_baseline": "mean",
          "group_scale": "none"}  # fmt: skip
    assert making._steps(rl) == (
        "2 policy steps each by gspo (sequence_mean); no critic: rewards against the group's mean; "
        "learning rate 1e-06"
    )


def test_results_for_model_pages(released: Path) -> None:
    from huggingface_hub import parse_eval_result_entries

    rows = yaml.safe_load((released / ".eval_results/aime24.yaml").read_text())
    entry = parse_eval_result_entries(rows)[0]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("a/aime", "aime24", 50.0)
    assert "standard error 10.00" in entry.notes


def test_dynamics_are_a_row_a_step(released: Path) -> None:
    table = pq.read_table(released / "dynamics/metrics.parquet").to_pylist()
    assert [(row["stage"], row["step"]) for row in table] == [("cold_start", 3), ("rl", 2)]
    assert table[1]["rollout/reward"] == 0.5
    assert pq.read_table(released / "dynamics/behaviours.parquet").num_rows == 1


def test_nothing_private_and_nothing_of_the_data(released: Path) -> None:
    for path in released.rglob("*"):
        if path.is_file() and path.suffix not in (".safetensors", ".png", ".parquet"):
            text = path.read_text()
            assert "secret" not in text, path
            assert "/tmp/" not in text, path
    assert list(leaks(released)) == []
    assert "command" not in json.loads((released / "training/env.json").read_text())


def test_the_sums_are_those_of_all_files(released: Path) -> None:
    lines = (released / "SHA256SUMS").read_text().splitlines()
    listed = dict(reversed(line.split("  ", 1)) for line in lines)
    there = {str(path.relative_to(released)) for path in released.rglob("*") if path.is_file()} - {
        "SHA256SUMS"
    }
    assert set(listed) == there
    for name, digest in listed.items():
        assert hashlib.sha256((released / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("name = ", "nom = "), "unknown key nom"),
        (('name = "someone/toy"', ""), "name is missing"),
        (('name = "someone/toy"', "name = 3"), "of the type str"),
        (('base_licence = "apache-2.0"', ""), "licence of a/base is not known"),
        (('licence = "cc0-1.0"', ""), "data set 1 needs"),
        (('task = "aime24"', ""), "evaluations.aime24 needs"),
        (("[[data]]", "[[data"), "release.toml"),
        (('base_licence = "apache-2.0"', 'base_licence = "other: X"'), "cannot be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_about_files_that_say_too_little(change, says: str, tmp_path: Path) -> None:
    path = an_about(tmp_path, ABOUT.replace(*change, 1))
    with pytest.raises(ReleaseError, match=says) as found:
        read_about(path)
    assert "\n" not in str(found.value)


def test_scores_that_nothing_measured_are_not_promised(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="aime24, which nothing measured: name its folder"):
        release([BASE_MODEL], a_run(tmp_path / "run"), tmp_path / "out",
                read_about(an_about(tmp_path)))  # fmt: skip


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ReleaseError, match="exists"):
        release([BASE_MODEL], a_run(tmp_path / "run"), tmp_path / "out",
                read_about(an_about(tmp_path)))  # fmt: skip


@pytest.mark.parametrize("fault", ["leak", "disk"])
def test_a_failure_leaves_nothing(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = UNMEASURED
    if fault == "leak":
        text = text.replace("[[data]]", 'summary = "from /home/somebody/x"\n[[data]]')
    else:
        monkeypatch.setattr(making, "_sums", lambda folder: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises((ReleaseError, OSError), match="README.md:|full"):
        release([BASE_MODEL], a_run(tmp_path / "run"), tmp_path / "out",
                read_about(an_about(tmp_path, text)))  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release.toml", "run"]


@pytest.mark.parametrize(
    "line",
    ["/home/eve/x", "/mnt/eve/x", "file:///srv/x", r"D:\sets\x", "http://u:pw@10.0.0.1/v1",
     "eve@example.org", "key sk-abcdefghijkl", "node-17 ran"],
)  # fmt: skip
def test_what_may_not_leave_is_found(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node-17")
    (tmp_path / "config.json").write_text(json.dumps({"x": line}))
    assert len(list(leaks(tmp_path))) == 1
    fine = "https://x.org/home/page, 1/2, a/b/c, </p>, v1.2, @media, 3 / 4"
    (tmp_path / "config.json").write_text(json.dumps({"x": fine}))
    assert list(leaks(tmp_path)) == []
    pq.write_table(pa.table({"model": ["m", line]}), tmp_path / "x.parquet")
    assert [place.split(": ")[0] for place in leaks(tmp_path)] == ["x.parquet:3"]


def test_the_folder_is_a_model_of_transformers(released: Path) -> None:
    """As a client loads it, all its weights and none missing."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model, about = AutoModelForImageTextToText.from_pretrained(released, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    assert not about["mismatched_keys"]
    ids = AutoTokenizer.from_pretrained(released)("1 + 1", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()
    assert model.generation_config.repetition_penalty == 1.0


def test_a_client_asks_it_about_an_image(released: Path) -> None:
    from transformers import pipeline

    ask = pipeline("image-text-to-text", model=str(released), device="cpu")
    content = [
        {"type": "image", "image": Image.new("RGB", (84, 84), "white")},
        {"type": "text", "text": "How many red?"},
    ]
    found = ask(
        text=[{"role": "user", "content": content}], max_new_tokens=8, return_full_text=False
    )
    assert isinstance(found[0]["generated_text"], str)


def test_an_evaluation_that_nothing_measured_is_named(tmp_path: Path) -> None:
    about = read_about(an_about(tmp_path, ABOUT.replace("evaluations.aime24", "evaluations.aime")))
    with pytest.raises(ReleaseError, match="evaluations.aime, which .* there are aime24"):
        release([BASE_MODEL], a_run(tmp_path / "run"), tmp_path / "out", about,
                evaluations=[an_evaluation(tmp_path / "model")])  # fmt: skip


def test_a_model_forgets_where_it_was(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BASE_MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/eve/m"}))
    (model / "NOTICE").write_text("of the base\n")
    (model / "LICENSE").write_text("of the base\n")
    beside = tmp_path / "out.release"
    beside.mkdir()
    made = release([model], a_run(tmp_path / "run"), tmp_path / "out",
                   read_about(an_about(tmp_path, UNMEASURED)))  # fmt: skip
    assert "_name_or_path" not in json.loads((made / "config.json").read_text())
    assert (made / "NOTICE").read_text().startswith("of the base\n\nsomeone/toy: apache-2.0")
    assert (made / "LICENSE.base").read_text() == "of the base\n"
    assert "Apache License" in (made / "LICENSE").read_text()
    assert beside.is_dir()


def test_models_of_two_shapes_and_unfinished_ones_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(BASE_MODEL, other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    config["text_config"].pop("layer_types", None)
    (other / "config.json").write_text(json.dumps(config))
    run, about = a_run(tmp_path / "run"), read_about(an_about(tmp_path, UNMEASURED))
    with pytest.raises(ModelError, match="not of the shape"):
        release([BASE_MODEL, other], run, tmp_path / "out", about)
    with pytest.raises(ReleaseError, match="not finished"):
        release([BASE_MODEL, tmp_path / "hf_000050.partial"], run, tmp_path / "out", about)
    assert not (tmp_path / "out").exists()


def test_points_are_no_shares(tmp_path: Path) -> None:
    study = an_evaluation(tmp_path / "model")
    rows = json.loads((study / "results.json").read_text())
    rows[0]["score"] = {"value": 1432.5, "error": None, "low": None, "high": None, "clusters": 1}
    (study / "results.json").write_text(json.dumps(rows))
    made = release([BASE_MODEL], a_run(tmp_path / "run", commit=None), tmp_path / "out",
                   read_about(an_about(tmp_path)), evaluations=[study])  # fmt: skip
    entry = yaml.safe_load((made / ".eval_results/aime24.yaml").read_text())[0]
    assert entry["value"] == 1432.5
    assert "no standard error" in entry["notes"]
    assert "| 1,432.5 |" in (made / "README.md").read_text()


def test_paths_and_names_are_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node-17")
    here = Path.cwd()
    for text, left in (
        (f'"{here}/configs/tiny.toml"', '"configs/tiny.toml"'),
        ('path = "/data/sets/math.parquet"', 'path = "math.parquet"'),
        ('"/home/eve/"', '"HOME"'),
        ('"/home/eve/my data/x.txt"', '"x.txt"'),
        ('"/data/my sets/x.parquet"', '"x.parquet"'),
        ("at /home/eve/x/y.txt", "at y.txt"),
        (r"C:\Users\eve\x", r"HOME\x"),
        ("1/2 and 3/4 of a/b/c", "1/2 and 3/4 of a/b/c"),
        ("https://host.org/a/b", "https://host.org/a/b"),
        ("</div></p>", "</div></p>"),
        ("ran on node-17", "ran on HOST"),
    ):
        assert scrubbed(text) == left
