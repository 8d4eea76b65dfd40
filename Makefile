# Every target makes the environment it needs and then runs one command in it.
#   PYTHON=python3.12 make test      another interpreter for a new environment (3.11 to 3.13)
#   WORKERS=4 make test              test processes
#   BENCH_OPTIONS=--quick make bench   seconds instead of minutes
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
OLD_VENV := .venv517
PY := $(VENV)/bin/python
OLD_PY := $(OLD_VENV)/bin/python
READY := $(VENV)/.ready
OLD_READY := $(OLD_VENV)/.ready
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
PYTEST_ENV := OMP_NUM_THREADS=1 $(OFFLINE)
PYTEST := -m pytest -q -n $(WORKERS) --dist worksteal
BENCH_OUT ?= runs/bench
BENCH_OPTIONS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench train-scenes clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## the embedded model with and without pruning: a table, and demo.html
	@echo "demo: the embedded model answers its benchmark with and without pruning; writes demo.html"
	@$(OFFLINE) $(PY) -m vlmattn demo --out demo.html

test: $(READY)  ## the default test suite
	@echo "test: the default suite on $(WORKERS) processes, offline"
	@$(PYTEST_ENV) $(PY) $(PYTEST)

test-all: $(READY) $(OLD_READY)  ## every test, and the contract tests once more with the oldest transformers supported
	@echo "test-all: every test, the slow product included"
	@$(PYTEST_ENV) $(PY) $(PYTEST) -m ""
	@echo "test-all: contract, families, engine, session and attention edits with the oldest transformers supported"
	@$(PYTEST_ENV) $(OLD_PY) $(PYTEST) -m "" $(wildcard tests/test_contract*.py tests/test_engine*.py tests/test_session*.py tests/test_attend*.py tests/test_scenes_engine.py tests/test_vision_store.py tests/test_families*.py)

lint: $(READY)  ## ruff (rules and format) and mypy
	@echo "lint: ruff and mypy"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy vlmattn

bench: $(READY)  ## time against arithmetic on this CPU, proofs first: a record, a page and a picture in BENCH_OUT
	@echo "bench: a large random model, plain, pruned and edited, into $(BENCH_OUT)"
	@$(OFFLINE) $(PY) -m vlmattn.bench --out $(BENCH_OUT) $(BENCH_OPTIONS)

train-scenes: $(READY)  ## train the embedded model from scratch and package it; goes on where it was stopped
	@echo "train-scenes: trains in build/scenes, packages into build/scenes-llava"
	@$(OFFLINE) $(PY) -m vlmattn.scenes.train --out build/scenes
	@$(OFFLINE) $(PY) -m vlmattn.scenes.choose build/scenes
	@$(OFFLINE) $(PY) -m vlmattn.scenes.export --run build/scenes --out build/scenes-llava

clean:  ## remove builds, caches and run folders; the environments stay
	@rm -rf build dist runs demo.html .pytest_cache .ruff_cache .mypy_cache
	@find vlmattn tests examples tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# torch goes first and alone: whatever build of the constrained version pip is set up to prefer (a CPU build, say)
# then satisfies everything that asks for torch afterwards.
$(READY): pyproject.toml constraints.txt
	$(call environment,$(VENV),constraints.txt)

$(OLD_READY): pyproject.toml constraints-5.17.txt
	$(call environment,$(OLD_VENV),constraints-5.17.txt)

supported = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

define environment
	@set -e; \
	python=$(PYTHON); if [ -x $(1)/bin/python ]; then python=$(1)/bin/python; fi; \
	$$python -c '$(supported)' || { \
	  echo "vlmattn needs Python 3.11 to 3.13, but '$$python' is $$($$python --version 2>&1)." \
	       "Name another one (PYTHON=python3.12 make ...), and remove $(1) if it was made with the wrong one." >&2; exit 1; }; \
	echo "environment: installing $(2) into $(1) (once; again when pyproject.toml or $(2) change)"; \
	$(1)/bin/python -m pip --version >/dev/null 2>&1 || $$python -m venv $(1); \
	$(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(2) torch; \
	$(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(2) -e '.[dev,eval]'; \
	touch $(1)/.ready
endef
