# cropi-tools: set-up, tests, the demo and the curriculum.
#
#   make demo                                  set up and run the whole curriculum on a tiny policy (CPU, minutes)
#   make test                                  set up and pass the tests
#   make curriculum CONFIG=examples/tiny/config.mk [GPUS=n] [STAGES=n] [FORCE=--force]
#
# A CONFIG file holds a run's values; curriculum.mk holds its rules and says what the values are.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables

PYTHON ?= python3
VENV ?= .venv
CONFIG ?=
# the environment that `make setup` makes comes first; without it, the commands on the PATH are used
export PATH := $(abspath $(VENV))/bin:$(PATH)
# threads that spin while they wait slow torch down many times over as soon as two processes share the cores
export OMP_WAIT_POLICY ?= PASSIVE
INSTALLED := $(VENV)/installed

.PHONY: help setup test test-slow demo lint format docs clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cropi-tools needs Python 3.11 or newer: make setup PYTHON=python3.11" >&2; exit 1; }
	@echo "installing into $(VENV) (some minutes; torch is large)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# one thread a process: the tests and the tiny policy gain nothing from more, and processes share the cores
test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m "not slow" -q

test-slow: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m slow -q

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

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache build *.egg-info

ifneq ($(CONFIG),)
include $(CONFIG)
include curriculum.mk
else
.PHONY: curriculum
curriculum:
	@echo "make curriculum needs CONFIG=FILE, such as CONFIG=examples/tiny/config.mk" >&2; exit 2
endif
