# demo, docs, test, test-ci, test-page, test-long, test-real, test-versions, lint, bench, quality, wheel: each makes .venv if it is missing and brings it up to date, then runs.
# An active virtualenv is only asked for its Python. PYTHON, TORCH, PYTEST_ARGS, PICTURES, BENCH_ARGS, QUALITY_ARGS: set them on the command line.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?= -n 3 --dist worksteal
PICTURES ?=
BENCH_ARGS ?=
QUALITY_ARGS ?=
REAL_HOME := $(CURDIR)/build/real
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What an editable install bakes in; Python files it reads from the tree, but knows them by their names.
NAMES := $(VENV)/.names-$(firstword $(shell find mechanex -name '*.py' | LC_ALL=C sort | cksum))
BAKED := pyproject.toml constraints.txt CMakeLists.txt mechanex/_version.py $(shell find csrc -type f) $(NAMES)
SOURCES := csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* tests/cuda_on_host/*

unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

.PHONY: help demo docs test test-ci test-page test-long test-real test-versions test-vllm lint bench quality wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   steer the bundled model: table, picture, figures"
	@echo "make docs   build the documentation's site into build/site, to be read offline: python -m http.server -d build/site"
	@echo "make test   run the tests"
	@echo "make test-ci   run those that take long and that a change seldom breaks: kernels on the CPU, packaging, faults, fuzzing, load"
	@echo "make test-page   run those of the playground in Chromium (apt-get install chromium); PICTURES=docs writes its pictures"
	@echo "make test-real   run the tests that need SmolLM2-135M (fetched once, 93 MB)"
	@echo "make test-versions   run those that depend on transformers most, with its oldest and its newest version"
	@echo "make test-vllm   run the tests of steering in vLLM, in an environment of their own (made once, 3.5 GB)"
	@echo "make test-long   run the tests that take minutes: every family of transformers, every case under Triton's interpreter"
	@echo "make lint   ruff, mypy --strict, clang-format"
	@echo "make bench  run the benchmarks, write benchmarks/RESULTS.md; BENCH_ARGS=\"--compare FILE.json\""
	@echo "make quality   measure tuned steering on SmolLM2-135M, write docs/quality.md (hours; QUALITY_ARGS=\"--prompts 10\")"
	@echo "make wheel  build a wheel into dist/ and try it in a fresh environment"

demo: $(VENV)/.demo
	$(BIN)/mechanex demo

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-ci: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "ci and not long" $(PYTEST_ARGS)

# A browser at work doesn't share two cores well: one process.
test-page: $(VENV)/.dev
	MECHANEX_PAGE_PICTURES=$(PICTURES) $(BIN)/python -m pytest -q -m "not long" tests/test_page.py tests/test_page_browser.py

test-real: $(VENV)/.dev
	$(BIN)/python scripts/real_model.py --home $(REAL_HOME)
	MECHANEX_REAL_HOME=$(REAL_HOME) $(BIN)/python -m pytest -q -m real

test-versions: $(VENV)/.dev
	PYTEST_ARGS="$(PYTEST_ARGS)" scripts/test_versions.sh

test-vllm:
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" scripts/vllm_env.sh
	build/vllm/venv/bin/python -m pytest -q -p no:cacheprovider tests/with_vllm

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m long $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

bench: $(VENV)/.dev
	$(BIN)/python -m pytest -q benchmarks --write-results $(BENCH_ARGS)

quality: $(VENV)/.dev
	$(BIN)/python scripts/real_model.py --home $(REAL_HOME)
	MECHANEX_HOME=$(REAL_HOME) $(BIN)/python benchmarks/quality.py $(QUALITY_ARGS)

wheel: $(VENV)/.venv
	rm -rf dist
	MECHANEX_REQUIRE_NATIVE=1 $(PIP) wheel -q --no-deps --build-constraint constraints.txt -w dist .
	@ls -l dist
	PYTHON=$(PYTHON) TORCH="$(TORCH)" scripts/check_wheel.sh

clean:
	rm -rf build dist

# torch goes first and alone: a resolver that sees the other packages may pick a newer one.
$(VENV)/.venv: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mechanex needs Python 3.10 or later, and $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt --upgrade pip
	$(PIP) install -q "$(TORCH)"
	touch $@

$(NAMES): | $(VENV)/.venv
	rm -f $(VENV)/.names-*
	touch $@

$(VENV)/.demo: $(VENV)/.venv $(BAKED)
	$(PIP) install -q -c constraints.txt --build-constraint constraints.txt -e ".[plot]"
	touch $@

$(VENV)/.dev: $(VENV)/.venv $(BAKED)
	$(PIP) install -q -c constraints.txt --build-constraint constraints.txt -e ".[test,bench,lint,docs]"
	touch $(VENV)/.demo $@
