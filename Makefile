# train · demo · test · check · bench · golden · soak (and base, lock, clean): each makes .venv first where it is missing.
# rehearse · gpu-env: in .venv-gpu, with the CUDA builds; no GPU is needed.
#
#   make train ARGS="run.seed=1 run.name=seed1"     settings for the run
#   make PYTHON=python3.12 train                    another interpreter

ARGS ?=
DATA := runs/toy_data
REHEARSAL := --config configs/ovr_7b_rl.toml --ranks 0,31
# Every pinned package has wheels for these.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12,$(shell command -v $(name) 2>/dev/null)))
PIP := .venv/bin/python -m pip --quiet --disable-pip-version-check install

.PHONY: train demo test check bench base lock golden soak rehearse gpu-env clean
.DELETE_ON_ERROR:

# torch first, with what it depends on (an index may serve a CPU or a CUDA build); then everything
# else at exactly the versions that were tried together. pip's warnings (of index locations that are
# not there, say) matter only where it fails, so they are printed only then.
.venv/ready: requirements/cpu.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or 3.12 is needed, and neither python3.11 nor python3.12 is on the PATH; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { echo "make: $(PYTHON) is not Python 3.11 or 3.12, for which the pinned packages have wheels"; exit 1; }
	@echo "environment: .venv with $(PYTHON) and requirements/cpu.txt, about 3 minutes and 4 GB"
	@$(PYTHON) -m venv --clear .venv
	@{ $(PIP) $$(grep '^torch==' requirements/cpu.txt) \
	  && $(PIP) --no-deps -r requirements/cpu.txt \
	  && $(PIP) --no-deps --no-build-isolation -e . ; } > .venv/pip.log 2>&1 \
	  || { cat .venv/pip.log; exit 1; }
	@touch .venv/ready

$(DATA): .venv/ready ovr_fast/toy/world.py ovr_fast/toy/data.py
	@echo "data: the toy world in $(DATA), a few seconds"
	@.venv/bin/python -m ovr_fast.toy.data --output $(DATA)
	@touch $(DATA)

train: .venv/ready $(DATA)
	@echo "train: configs/tiny.toml, 20 to 24 minutes on two idle cores: a vLLM server starts, then 240 cold-start and 108 PPO steps"
	@.venv/bin/torchrun --standalone --nproc-per-node 1 -m ovr_fast.train --config configs/tiny.toml $(ARGS)

# The whole suite in two processes (what tests/conftest.py puts in each), a part of it in one.
test: .venv/ready
	.venv/bin/python -m pytest $(or $(ARGS),-n 2)

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/ready
	.venv/bin/python -m pytest benchmarks --benchmark-only $(ARGS)

# What moved in the golden metrics; ARGS=--write rewrites them.
golden: .venv/ready
	.venv/bin/python tests/golden/golden.py $(ARGS)

# A toy run whose servers and trainer are killed, frozen and stopped 20 times, beside one left alone.
soak: .venv/ready
	.venv/bin/python tests/end_to_end/soak.py $(ARGS)

# A toy base model like the shipped one (7,700 steps, the longest job here).
base: .venv/ready
	.venv/bin/python -m ovr_fast.toy.base --output runs/base_model

# The environment of a machine with GPUs, installed from the same file as there.
.venv-gpu/ready: requirements/gpu.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or 3.12 is needed, and neither python3.11 nor python3.12 is on the PATH"; exit 1; }
	@echo "environment: .venv-gpu with $(PYTHON) and requirements/gpu.txt, about 5 minutes and 8 GB"
	@$(PYTHON) -m venv --clear .venv-gpu
	@{ .venv-gpu/bin/python -m pip --quiet --disable-pip-version-check install --no-deps -r requirements/gpu.txt \
	  && .venv-gpu/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --no-build-isolation -e . ; } \
	  > .venv-gpu/pip.log 2>&1 || { cat .venv-gpu/pip.log; exit 1; }
	@touch .venv-gpu/ready

gpu-env: .venv-gpu/ready

# First and last trainer rank of the 64-GPU recipe on pretended GPUs; ARGS="--config ..." for another run.
rehearse: .venv-gpu/ready
	.venv-gpu/bin/python -m ovr_fast.rehearse $(if $(ARGS),$(ARGS),$(REHEARSAL))

lock:
	{ grep '^#' requirements/cpu.txt; .venv/bin/pip freeze --exclude-editable \
	  | grep -v -i -E '^(torchaudio|torchcodec)=' | sed 's/+cpu$$//'; } > requirements/cpu.new
	mv requirements/cpu.new requirements/cpu.txt

# Trainings in runs/ stay.
clean:
	rm -rf .venv .venv-gpu $(DATA)

# What follows a training run, on the toy: benchmarks of three models, comparison, behaviours by rules
# and by a judge with known errors, report, release, and the released model measured again.
RUN ?= runs/tiny
demo: .venv/ready
	@test -d $(RUN)/hf -a -d $(RUN)/cold_start_hf || { echo "make demo: $(RUN) holds no trained model; make train comes first, or name another run: make demo RUN=runs/NAME"; exit 1; }
	@.venv/bin/python -m ovr_fast.toy.demo --run $(RUN) --output runs/demo
