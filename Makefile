# Every command of the project. `make` alone lists them.
#
#   PYTHON=python3.12      the interpreter to build .venv with (3.11 or newer)
#   TORCH_BACKEND=cpu      take torch from PyTorch's own index instead of the package index: cpu, cu128, ... (see uv)
#   ARGS='...'             further arguments for demo, test, torture and the benchmarks
#   SEED=7                 which instants torture chooses

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH_BACKEND ?=
ARGS ?=
SEED ?= 1

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := pipelines models calibration monitoring jobs
UV_INSTALL := $(BIN)/uv pip install --python $(BIN)/python
# The lock is a constraint: one file pins every extra, and each target installs the part that it needs. uv checks
# the hashes in it.
LOCKED := -r pyproject.toml -c requirements.lock

NEED_PYTHON := error: Python 3.11 or newer with venv is needed, and $(PYTHON) is not one: install it (Debian, Ubuntu: apt-get install python3 python3-venv) or name another, as in make PYTHON=python3.12.
NEED_JAVA := error: Java 17 or newer is needed: install it (Debian, Ubuntu: apt-get install openjdk-17-jre-headless) or point JAVA_HOME at one.
NEED_INDEX := error: the Python package index cannot be reached: connect to the network, or set PIP_INDEX_URL and UV_DEFAULT_INDEX to a mirror.
NEED_INSTALL := error: installing stopped, for the reason above; if the package index cannot be reached, connect to the network or set UV_DEFAULT_INDEX to a mirror.
NEED_BROWSER := error: the page tests need Chromium: install it (Debian, Ubuntu: apt-get install chromium).

.PHONY: help setup setup-test setup-bench bench-stream demo test torture check format format-check lint types imports lock clean distclean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# ---- set-up: each step leaves a stamp, so that a second run does nothing

setup: $(VENV)/.setup-done ## Create .venv with all that ctrstream needs

setup-test: $(VENV)/.setup-test-done ## The same, and what the tests and checks need (a browser too)

setup-bench: $(VENV)/.setup-bench-done ## The same, and what the comparisons under benchmarks/ need

$(BIN)/uv:
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || { echo "$(NEED_PYTHON)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing uv, the package installer"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 uv 2>$(VENV)/pip.log || { \
	    if grep -qiE 'connection|timed out|resolution|no matching distribution' $(VENV)/pip.log; \
	    then echo "$(NEED_INDEX)" >&2; else cat $(VENV)/pip.log >&2; fi; exit 1; }

# JAVA_HOME wins, as in jobs/java.py.
$(VENV)/.setup-done: pyproject.toml requirements.lock | $(BIN)/uv
	@java="$${JAVA_HOME:+$$JAVA_HOME/bin/}java"; \
	    version=$$("$$java" -version 2>&1 | sed -nE 's/.*version "(1\.)?([0-9]+).*/\2/p' | head -n 1 || true); \
	    test "$${version:-0}" -ge 17 || { echo "$(NEED_JAVA)" >&2; exit 1; }
	@echo "installing what ctrstream needs (about 5 GB, most of it torch; TORCH_BACKEND=cpu saves 4)"
	@test -z "$(TORCH_BACKEND)" || $(UV_INSTALL) --torch-backend $(TORCH_BACKEND) \
	    "$$(sed -nE 's/^(torch==[^ ]+).*/\1/p' requirements.lock)"
	@$(UV_INSTALL) $(LOCKED) || { echo "$(NEED_INSTALL)" >&2; exit 1; }
	@$(UV_INSTALL) --no-deps --editable . || { echo "$(NEED_INSTALL)" >&2; exit 1; }
	@touch $@

$(VENV)/.setup-test-done: $(VENV)/.setup-done
	@echo "installing what the tests need"
	@$(UV_INSTALL) $(LOCKED) --extra dev || { echo "$(NEED_INSTALL)" >&2; exit 1; }
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	    if ! command -v apt-get >/dev/null; then echo "$(NEED_BROWSER)" >&2; exit 1; fi; \
	    if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root="sudo -n"; \
	    else echo "$(NEED_BROWSER)" >&2; exit 1; fi; \
	    echo "installing Chromium with apt-get"; \
	    $$root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$root apt-get install -qq -y \
	        --no-install-recommends chromium fonts-dejavu-core >/dev/null \
	        || { echo "$(NEED_BROWSER)" >&2; exit 1; }; }
	@touch $@

$(VENV)/.setup-bench-done: $(VENV)/.setup-done
	@echo "installing what the benchmarks need"
	@$(UV_INSTALL) $(LOCKED) --extra bench || { echo "$(NEED_INSTALL)" >&2; exit 1; }
	@touch $@

# ---- use

demo: setup ## Run the whole story on this machine, into runs/demo
	$(BIN)/ctrstream demo --out runs/demo $(ARGS)

bench-stream: bench-sample-stream ## Speed and memory of reading samples batch by batch, against other ways

bench-%: setup-bench ## Run one comparison, as in `make bench-backtest`
	$(BIN)/python -m benchmarks.$(subst -,_,$*) $(ARGS)

# ---- checks

test: setup-test ## Run the tests, with Kafka, Spark, MLflow and a browser really running
	$(BIN)/python -m pytest -q $(ARGS)

torture: setup-test ## Kill the worker at every write point and at random instants, and compare what it leaves; SEED=7 chooses them
	$(BIN)/python -m tests.torture --seed $(SEED) $(ARGS)

check: format-check lint types imports test ## All that a change must pass

format: setup-test ## Format the code
	$(BIN)/ruff check --select I --fix --quiet .
	$(BIN)/ruff format .

format-check: setup-test
	$(BIN)/ruff format --check .

lint: setup-test
	$(BIN)/ruff check .

types: setup-test
	$(BIN)/mypy

imports: setup-test
	$(BIN)/lint-imports

# ---- care

# One lock for every extra, for every platform, without registry addresses. The jars have a lock of their own.
lock: setup ## Renew requirements.lock and jobs/jars.lock
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras --generate-hashes \
	    --no-emit-index-url --no-annotate --no-header --output-file requirements.lock pyproject.toml
	$(BIN)/python -m jobs.jars_lock

clean: ## Remove caches and build folders
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf spark-warehouse metastore_db derby.log
	find $(PACKAGES) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too (runs/ stays)
	rm -rf $(VENV)
