# train · test · check · bench: each makes .venv first where it is missing.
#
#   make train ARGS="run.seed=1 run.name=seed1"     settings for the run
#   make PYTHON=python3.12 train                    another interpreter

PYTHON ?= python3.11
ARGS ?=
DATA := runs/toy_data

.PHONY: train test check bench base lock clean
.DELETE_ON_ERROR:

# torch first, with what it depends on (an index may serve a CPU or a CUDA build); then everything
# else at exactly the versions that were tried together.
.venv/ready: requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements/cpu.txt)
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.txt
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch .venv/ready

$(DATA): .venv/ready ovr_fast/toy/world.py ovr_fast/toy/data.py
	.venv/bin/python -m ovr_fast.toy.data --output $(DATA)
	touch $(DATA)

train: .venv/ready $(DATA)
	.venv/bin/torchrun --standalone --nproc-per-node 1 -m ovr_fast.train --config configs/tiny.toml $(ARGS)

test: .venv/ready
	.venv/bin/python -m pytest $(ARGS)

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/ready
	.venv/bin/python -m pytest benchmarks --benchmark-only $(ARGS)

# A toy base model like the shipped one (7,700 steps, the longest job here).
base: .venv/ready
	.venv/bin/python -m ovr_fast.toy.base --output runs/base_model

lock:
	{ grep '^#' requirements/cpu.txt; .venv/bin/pip freeze --exclude-editable \
	  | grep -v -i -E '^(torchaudio|torchcodec)=' | sed 's/+cpu$$//'; } > requirements/cpu.new
	mv requirements/cpu.new requirements/cpu.txt

# Trainings in runs/ stay.
clean:
	rm -rf .venv $(DATA)
