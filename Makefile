# cropi-tools: set-up, tests, the demo and the curriculum.
#
#   make demo                                  set up and run the whole curriculum on a tiny policy (CPU, minutes)
#   make real                                  the same on a real chat model, SmolLM2-135M-Instruct (CPU, about half an hour)
#   make reproduce                             the evidence in docs/results/reproduce: all arms, beds and seeds (hours)
#   make test                                  set up and pass the tests
#   make config CONFIG=FILE                    write a config to fill in (without CONFIG to the terminal)
#   make curriculum CONFIG=examples/tiny/config.mk [GPUS=n] [STAGES=n] [FORCE=--force]
#   make estimate CONFIG=examples/tiny/config.mk   what that will take: time, tokens and disk of each arm
#
# A CONFIG file holds a run's values, which docs/curriculum.md explains; curriculum.mk holds the rules.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables

PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
VENV_PEERS ?= .venv-peers
CONFIG ?=
# the environment that `make setup` makes comes first; without it, the commands on the PATH are used
export PATH := $(abspath $(VENV))/bin:$(PATH)
INSTALLED := $(VENV)/installed
INSTALLED_VLLM := $(VENV_VLLM)/installed
INSTALLED_PEERS := $(VENV_PEERS)/installed

.PHONY: help setup test test-slow demo real real-smoke reproduce config lint format docs clean setup-vllm test-vllm setup-peers test-peers
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -11

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cropi-tools needs Python 3.11 or newer: make setup PYTHON=python3.11" >&2; exit 1; }
	@echo "installing into $(VENV) (some minutes; torch is large)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# vLLM for CPUs with exactly the tested packages; where the index has no torch for CPUs, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
setup-vllm: $(INSTALLED_VLLM)

$(INSTALLED_VLLM): pyproject.toml constraints-vllm.txt
	@echo "installing into $(VENV_VLLM) (some minutes; vLLM and torch are large)"
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-vllm: setup-vllm
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest -m vllm -q tests/with_vllm

# verl, whose pins clash with ours, as a folder of packages that the tests put before those of $(VENV)
setup-peers: $(INSTALLED_PEERS)

$(INSTALLED_PEERS): constraints-peers.txt | $(INSTALLED)
	rm -rf $(VENV_PEERS)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV_PEERS) -r constraints-peers.txt
	@touch $@

test-peers: setup-peers
	OMP_NUM_THREADS=1 CROPI_PEERS=$(abspath $(VENV_PEERS)) $(VENV)/bin/python -m pytest -m peers -q tests/peers

# one thread a process: the tests and the tiny policy gain nothing from more, and processes share the cores
test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m "not slow and not vllm and not peers" -q

test-slow: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadgroup -m "slow and not vllm and not peers" -q

lint: setup
	$(VENV)/bin/ruff check cropi_tools tests benchmarks examples docs
	$(VENV)/bin/ruff format --check cropi_tools tests benchmarks examples docs
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix cropi_tools tests benchmarks examples docs
	$(VENV)/bin/ruff format cropi_tools tests benchmarks examples docs

docs: setup
	$(VENV)/bin/python docs/update_help.py

# first the starting policy, then the arms, two at a time with a thread each
DEMO := $(MAKE) --no-print-directory CONFIG=examples/tiny/config.mk
demo: setup
	@$(DEMO) starting-policy
	@OMP_NUM_THREADS=1 $(DEMO) -j2 curriculum
	@$(DEMO) report

# the same on a real chat model, which a package of the index ships; see examples/smollm2-135m/README.md
REAL := $(MAKE) --no-print-directory CONFIG=examples/smollm2-135m/config.mk
GGUF = @$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
real: setup
	$(GGUF)
	@$(REAL) starting-policy
	@OMP_NUM_THREADS=1 $(REAL) -j2 curriculum
	@$(REAL) report

# one stage of two steps on a few prompts
real-smoke:
	@$(MAKE) --no-print-directory real RUN=runs/smollm2-smoke DATA=runs/smollm2-smoke/data STAGES=1 STEPS=2 SAMPLES=4 VALID_SAMPLES=4 BATCH=4 POOL_SIZE=2 \
	  VALID_SIZE=3 TEST_SIZE=3 RATIO=0.25

# the evidence: every bed, arm and seed of benchmarks/reproduce/plan.toml, hours on two cores; resumes, and REPRODUCE="--beds wrong --seeds 2" runs a part
REPRODUCE ?=
reproduce: setup
	$(GGUF)
	@$(VENV)/bin/python benchmarks/reproduce/run.py $(REPRODUCE)
	@$(VENV)/bin/python benchmarks/reproduce/analyze.py

TEMPLATE := examples/config.mk
define config-file
mkdir -p $(dir $(CONFIG)) && cp $(TEMPLATE) $(CONFIG) && echo "$(CONFIG): fill it in; then make -n curriculum CONFIG=$(CONFIG)"
endef
config:
	@$(if $(wildcard $(CONFIG)),$(error CONFIG=$(CONFIG): exists; give the name of a new file))$(if $(CONFIG),$(config-file),cat $(TEMPLATE))

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache build *.egg-info

ifneq ($(filter config,$(MAKECMDGOALS)),)
else ifneq ($(CONFIG),)
$(if $(wildcard $(CONFIG)),,$(error CONFIG=$(CONFIG): no such file; `make config CONFIG=$(CONFIG)` writes one to fill in))
$(if $(wildcard $(CONFIG)/.),$(error CONFIG=$(CONFIG): is a folder; give a file, such as $(CONFIG)/config.mk))
include $(CONFIG)
include curriculum.mk
else
.PHONY: curriculum estimate
curriculum estimate:
	@echo "make $@ needs CONFIG=FILE, such as CONFIG=examples/tiny/config.mk" >&2; exit 2
endif
