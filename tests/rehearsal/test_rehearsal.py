"""Rehearsals on pretended GPUs: what they prepare, and which faults of GPU branches they catch.

Those that run one need ``make gpu-env`` and are skipped without it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ovr_fast.config import DataSource, load_config
from ovr_fast.data.chat import ChatTemplate
from ovr_fast.data.prompts import read_source
from ovr_fast.model.hf_weights import HFReader
from ovr_fast.rehearse import build
from ovr_fast.rehearse.__main__ import prepare
from ovr_fast.rehearse.hollow import rehearsal_config, write_hollow_model, write_prompts
from ovr_fast.settings import ConfigError
from ovr_fast.shape.folder import PUBLISHED
from ovr_fast.shape.model_shape import read_shape
from support.processes import HUNG_S, run_command
from support.toy_run import ROOT

GPU_PYTHON = ROOT / ".venv-gpu" / "bin" / "python"
with_gpu_env = pytest.mark.skipif(not GPU_PYTHON.exists(), reason="make gpu-env makes .venv-gpu")
TOY = [
    "--config", "configs/tiny.toml", "model.dtype=bfloat16", 'run.stages=["rl"]',
    "rl.critic_steps=1", "--steps", "1",
]  # fmt: skip


def test_a_hollow_model_has_the_shape_and_takes_no_disk(tmp_path: Path) -> None:
    name = PUBLISHED / "Qwen2.5-VL-7B-Instruct" / "config.json"
    write_hollow_model(tmp_path / "model", name)
    published, found = read_shape(name.parent), read_shape(tmp_path / "model")
    assert found.parameter_counts() == published.parameter_counts()
    files = [path.stat() for path in (tmp_path / "model").glob("*.safetensors")]
    assert sum(file.st_size for file in files) > 15e9
    assert max(file.st_size for file in files) < 5e9  # or a laptop could not map it
    assert sum(file.st_blocks * 512 for file in files) < 1e6
    reader = HFReader(tmp_path / "model")
    file, key = reader._where["lm_head.weight"]
    assert file.get_slice(key).get_shape() == [152_064, 3584]


def test_prompts_are_as_long_as_asked(tmp_path: Path) -> None:
    write_hollow_model(tmp_path / "model", PUBLISHED / "Qwen2.5-VL-3B-Instruct" / "config.json")
    write_prompts(tmp_path / "prompts.jsonl", count=2, tokens=4096)
    shape = read_shape(tmp_path / "model")
    chat = ChatTemplate(tmp_path / "model", image_token_id=shape.image_token_id)
    prompts = read_source(DataSource(path=str(tmp_path / "prompts.jsonl")), need="answer")
    lengths = [len(chat.encode(p.messages, p.images, generation_prompt=True)) for p in prompts]
    assert all(4000 < length <= 4096 for length in lengths)


def test_every_update_fills_the_pipeline_with_the_longest_rollouts(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "ovr_7b_rl.toml")
    found = rehearsal_config(config, replicas=4, folder=tmp_path, steps=2)
    rollouts = found.rl.prompts_per_step * found.rl.samples_per_prompt
    assert rollouts == config.rl.critic_steps * 4 * config.parallel.pipeline
    assert found.rl.context_tokens == (49152,)
    assert found.rl.max_tokens_per_microbatch == config.rl.max_tokens_per_microbatch


def test_unlike_microbatches_come_in_the_shapes_they_were_sent_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the middle of three stages: hidden states and gradients of microbatches of 8, 4 and 6
    tokens on two tensor ranks, in the order of one forward, one backward."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from ovr_fast.parallel import schedule
    from ovr_fast.rehearse import stand_ins

    def run(model, pairs, mesh, head, **options) -> list:
        stage = SimpleNamespace(config=SimpleNamespace(hidden_size=16))
        turns = [(True, False), (True, False), (False, True), (True, True), (False, True)]
        return [
            P2PCommunicator._communicate_shapes(stage, None, None, recv_prev, recv_next)
            for recv_prev, recv_next in turns
        ]

    monkeypatch.setattr(schedule, "_run", run)
    original = P2PCommunicator._communicate_shapes
    monkeypatch.setattr(P2PCommunicator, "_communicate_shapes", original)
    stand_ins._agree_on_shapes()
    pairs = [(SimpleNamespace(tokens_T=torch.zeros(count)), None) for count in (8, 4, 6)]
    for _ in range(2):  # each update begins anew
        shapes = schedule._run(None, pairs, SimpleNamespace(tp=2), None)
        found = [[side[0] if side[0] else None for side in turn] for turn in shapes]
        assert found == [[4, None], [2, None], [None, 4], [3, 2], [None, 3]]


def test_an_output_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    arguments = SimpleNamespace(output=tmp_path, layers=0, steps=1)
    config = load_config(ROOT / "configs" / "ovr_7b_rl.toml")
    with pytest.raises(ConfigError, match="something else than a rehearsal"):
        prepare(arguments, config, 32)  # type: ignore[arg-type]
    assert (tmp_path / "thesis.tex").exists()


def test_the_card_compiles_and_a_cpu_build_of_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.NoCard, match=r"is a CPU build.*make rehearse"):
        build.card_libraries()
    includes = build.cuda_include("13")
    strict = [
        "-Wall",
        "-Werror",
        "-Wno-unused",
        "-fsyntax-only",
        *(f"-I{place}" for place in includes),
    ]
    for source in sorted(build.SOURCES.glob("*.c")):
        subprocess.run(["gcc", *strict, str(source)], check=True)


def rehearse(
    root: Path, output: Path, *words: str, base: list[str] = TOY
) -> subprocess.CompletedProcess:
    """A rehearsal by the sources in ``root``."""
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    return run_command(
        [str(GPU_PYTHON), "-m", "ovr_fast.rehearse", "--output", str(output), *base, *words],
        environment={**os.environ, "PYTHONPATH": paths},
        timeout_s=HUNG_S,
        cwd=root,
    )


@with_gpu_env
@pytest.mark.slow
def test_two_tensor_ranks_train_and_the_host_seldom_waits(tmp_path: Path) -> None:
    done = rehearse(ROOT, tmp_path, "parallel.world=2", "parallel.tensor=2", "--save")
    assert done.returncode == 0, done.stdout[-3000:]
    for rank in (0, 1):
        report = json.loads((tmp_path / "reports" / f"rl-{rank:05d}.json").read_text())
        assert report["phases"]["actor"]["collectives"] > 0
        for phase, microbatches in (("critic", 2), ("actor", 2)):
            # Four of the update (sums, norm, two of what is not finite), and one in reserve.
            assert report["phases"][phase]["waits"] <= microbatches + 5, report["waits"]
    assert (tmp_path / "rl" / "hf" / "model.safetensors").is_file()


@with_gpu_env
@pytest.mark.slow
def test_a_layout_that_does_not_fit_runs_out_of_memory(tmp_path: Path) -> None:
    words = ["parallel.world=1", "parallel.tensor=1", "parallel.pipeline=1"]
    words += ["model.recompute=none", "rl.critic_steps=1", "rl.samples_per_prompt=2"]
    recipe = ["--config", "configs/ovr_7b_rl.toml", "--layers", "4", "--steps", "1"]
    done = rehearse(ROOT, tmp_path, *words, base=recipe)
    assert done.returncode != 0
    assert "OUT OF MEMORY in actor: CUDA out of memory" in done.stdout
    (planned,) = re.findall(r"plan, rl: (\d+)", done.stdout)
    assert int(planned) > 79, "the plan knew"
    assert "CUDA out of memory. Tried to allocate" in done.stdout


@with_gpu_env
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "right", "wrong", "message", "words"),
    [
        (  # a wrong dtype to an operator
            "ovr_fast/model/qwen25_vl.py",
            "visual.to(hidden.dtype)[:, None]",
            "visual.float()[:, None]",
            "same dtype",
            [],
        ),
        (  # a keyword that does not exist, in a branch of GPUs alone
            "ovr_fast/model/attention.py",
            "longest, longest, window_size=window, **options)",
            "longest, longest, window_sizes=window, **options)",
            "window_sizes",
            [],
        ),
        (  # a tensor left on the CPU
            "ovr_fast/records.py",
            "tokens_T=to_device(self.tokens_T, device)",
            "tokens_T=self.tokens_T",
            "device",
            [],
        ),
        (  # a collective that two ranks do not make alike
            "ovr_fast/learner/finite.py",
            "found = torch.tensor(float(flag), device=mesh.device)",
            "found = torch.zeros(1 + mesh.rank, device=mesh.device)",
            "but rank 1 came with",
            ["parallel.world=2", "parallel.tensor=2"],
        ),
    ],
)
def test_a_planted_fault_is_caught(
    file: str, right: str, wrong: str, message: str, words: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "tree"
    for part in ("ovr_fast", "kernels", "configs"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    source = (root / file).read_text()
    assert source.count(right) == 1, right
    (root / file).write_text(source.replace(right, wrong))
    done = rehearse(root, tmp_path / "out", *words)
    assert done.returncode != 0
    assert message in done.stdout, done.stdout[-3000:]
