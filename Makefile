# `make train` and `make test` are all a fresh machine needs; `make help` lists the rest.
#
#   make train EXPERIMENT=ml-1m/hstu ARGS="optim.lr=3e-4 seed=1"
#   make test TEST_ARGS="tests/test_doctor.py -k matrix"
#   make install BUILD=cuda PYTHON=/usr/bin/python3.12

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?=
EXPERIMENT ?=
ARGS ?=
OUT ?=
DATA ?=
TEST_ARGS ?=
TEST_JOBS ?= 2

# cpu or cuda: what is installed already, else cuda where nvidia-smi works. `BUILD=...` overrides.
INSTALLED := $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-cpu $(VENV)/.installed-cuda)))
BUILD ?= $(or $(INSTALLED),$(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu))
STAMP := $(VENV)/.installed-$(BUILD)

.PHONY: help install train prepare evaluate recommend bench gpu-report test lint format typecheck docs doctor clean clean-venv

help: ## list the targets
	@echo "Targets (EXPERIMENT=ml-1m/hstu and ARGS=\"optim.lr=3e-4\" go to the command; BUILD=cpu|cuda picks the pins):"
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with the pinned requirements (done once; other targets do it too)

$(STAMP): requirements/$(BUILD).txt requirements/install.sh setup.py hstu/_matrix.py pyproject.toml
	@bash requirements/install.sh "$(BUILD)" "$(VENV)" "$(PYTHON)"

train: $(STAMP) ## install, train the default (synthetic) experiment or EXPERIMENT, print the result table
	@$(BIN)/hstu-train $(if $(EXPERIMENT),experiment=$(EXPERIMENT)) $(ARGS)

prepare: $(STAMP) ## hstu-prepare; ARGS="data=ml-1m"
	@$(BIN)/hstu-prepare $(ARGS)

evaluate: $(STAMP) ## hstu-evaluate; ARGS="run=runs/..."
	@$(BIN)/hstu-evaluate $(ARGS)

recommend: $(STAMP) ## hstu-recommend; ARGS="run=runs/... user=42 k=10"
	@$(BIN)/hstu-recommend $(ARGS)

bench: $(STAMP) ## hstu-bench; ARGS="op=attention sizes=quick", ARGS="compare A B" or ARGS=aot
	@$(BIN)/hstu-bench $(ARGS)

gpu-report: $(STAMP) ## everything that needs a GPU, in 8 minutes; OUT=folder DATA=folder-with-stores ARGS="minutes=8"
	@$(if $(OUT),,echo "error: give a folder: make gpu-report OUT=report [DATA=data]" >&2; exit 1;) \
	$(BIN)/python -m benchmarks.gpu_report out=$(OUT) $(if $(DATA),data=$(DATA)) $(ARGS)

# Two test processes, one torch thread each: the suite is many small tests, not big products. Commands that tests start
# would compile every module anew where the environment forbids to keep what was compiled.
test: $(STAMP) ## the whole test suite; TEST_ARGS go to pytest
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile $(TEST_ARGS)

lint: $(STAMP) ## ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(STAMP) ## let ruff fix what it can
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

typecheck: $(STAMP) ## mypy on hstu and kernels
	@$(BIN)/python -m mypy

docs: $(STAMP) ## regenerate docs/config.md and the README's tables
	@$(BIN)/python -m hstu.config_docs && $(BIN)/python -m hstu.report readme

doctor: $(STAMP) ## versions, backends, a parity check of every op
	@$(BIN)/hstu-doctor

clean: ## remove caches and build leftovers; keeps .venv, data and runs
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find hstu kernels conf benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: ## remove .venv
	@rm -rf $(VENV)
