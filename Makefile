# SPDX-License-Identifier: Apache-2.0
# Two commands do everything on a fresh machine: make demo, make test. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SYSTEM ?= point_moe
STAGES := $(foreach number,0 1 2 3,--stage configs/stages/unimoe_audio_$(number).yaml)

# Small networks gain nothing from a second thread, and lose much of their speed when the machine has other work.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# Processes that share the tests: JOBS=0 runs them in one, where a debugger works. The first to finish takes over tests
# of the other.
JOBS   ?= 2
CASES  ?= 10000
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo audio-curriculum adaptation test test-fast test-slow fuzz check format docs notebooks lock bench evidence reliability mutate gpu-check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the tested versions (about 5 minutes, 7 GB)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "moeapps needs Python >= 3.11, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	@echo "making $(VENV): about 170 packages, 7 GB; 5 minutes, of which the last two write files without a word"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt \
		--config-settings editable_mode=compat -e '.[dev]'  # a line of the path: import works beside the checkout, too
	@touch $(STAMP)

demo: setup  ## three systems and a dense twin on two cores, then one page of what the experts did (10 minutes; goes on)
	$(BIN)/python -m benchmarks.demo

audio-curriculum: setup  ## train UniMoE-Audio in its four stages; goes on where it stopped (under 25 minutes)
	$(ONE_THREAD) $(BIN)/moeapps curriculum --config configs/unimoe_audio.yaml $(STAGES)

adaptation: setup  ## train the four stages of Meta-DMoE, then test on domains never seen (under 5 minutes); resumable
	$(ONE_THREAD) $(BIN)/moeapps curriculum --config configs/meta_dmoe.yaml $(foreach stage,student experts aggregator meta,--stage configs/stages/meta_dmoe_$(stage).yaml)

test: setup  ## all but test-slow (what CI runs; 10 to 13 minutes on two cores, JOBS=2)
	$(PYTEST) --fail-on-skip --doctest-modules moeapps tests

test-fast: setup  ## the laws only, while you work (under 3 minutes)
	$(PYTEST) -m 'not slow and not medium' tests

test-slow: setup  ## processes, faults, resume, notebooks (20 minutes on two idle cores)
	$(PYTEST) -m slow tests

fuzz: setup  ## damage files of every format at random, CASES=10000 of each: read, or told; goes on (rm -r runs/fuzz: anew)
	MOEAPPS_FUZZ=$(CASES) $(PYTEST) -m '' -k is_read_or_told tests

check: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff format and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup  ## the site into build/site/index.html; warnings are errors (a minute, no network)
	$(ONE_THREAD) $(BIN)/python -m sphinx -W --keep-going -q -c docs . build/site
	@echo build/site/index.html

notebooks: setup  ## run every notebook; copies with outputs in build/notebooks (about 15 minutes)
	mkdir -p build/notebooks
	$(ONE_THREAD) $(BIN)/python -m jupyter nbconvert --to notebook --execute --output-dir build/notebooks notebooks/*.ipynb

lock: setup  ## requirements.lock anew: constraints.txt with the hash of every file (asks the package index)
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet uv
	build/lock/bin/uv pip compile pyproject.toml --extra dev --constraint constraints.txt --generate-hashes \
		--python-version 3.11.13 --python-platform linux --no-header --no-annotate --quiet --output-file requirements.lock

bench: setup  ## the core against the dense roof, PEERS=1: and other projects (45 + 35 minutes on an idle machine)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.backend_table
	@status=0; $(if $(PEERS),$(ONE_THREAD) $(BIN)/python -m benchmarks.peers || status=1;) \
	$(ONE_THREAD) $(BIN)/python -m benchmarks.core --json benchmarks/results/core.json $(if $(PEERS),--peers) || status=1; \
	exit $$status

evidence: setup  ## the multi-seed claims of one system: make evidence SYSTEM=point_moe (hours; resumable)
	$(BIN)/python -m benchmarks.evidence $(SYSTEM)

reliability: setup  ## faults, memory and leaks for docs/reliability.md; measures what its results lack (about 30 minutes)
	$(BIN)/python -m benchmarks.reliability

mutate: setup  ## break the core and the training on purpose; fails when a mutation survives its tests
	$(ONE_THREAD) $(BIN)/python -m benchmarks.mutate

gpu-check: setup  ## one CUDA device in ten minutes: bf16 steps, compilation, kernels; says so where there is none
	$(BIN)/python -m benchmarks.gpu --json benchmarks/results/gpu.json

clean:  ## remove caches of the tools (never runs, data or the environment)
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
