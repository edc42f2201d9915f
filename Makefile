# make demo        the main job, with no card and no network
# make test        every test, and which took longest
# make quick       the quick tests that need neither Ray nor llama.cpp, in less than two minutes
# make check       style, types, import contracts, documentation
# make bench       the figures of docs/benchmarks.md
# make setup       only the environment (.venv); the others imply it, and a second run starts at once
# make lock        pin the newest releases that pyproject.toml allows (needs uv)
# make bump        check another llama-cpp-python, and take it if it is newer: make bump VERSION=0.3.36
#
# CUDA=1 builds llama.cpp for NVIDIA cards, CUDA=0 for the CPU again; without it the build stays as it is.
# PYTHON=python3.12 names the interpreter that .venv is made with.

PYTHON ?= python3
CUDA ?=
BIN := .venv/bin

installed := $(shell cat .venv/ready 2>/dev/null)
variant := $(if $(CUDA),$(if $(filter 0,$(CUDA)),cpu,cuda),$(installed))

.PHONY: setup demo test quick quick-half quick-rest check bench lock bump clean FORCE
.DELETE_ON_ERROR:

setup: .venv/ready

ifneq ($(variant),$(installed))
.venv/ready: FORCE
endif
BUILT := setup/environment.py setup/llama_build.py setup/common_build.py setup/progress.py setup/llama_common/CMakeLists.txt \
	actors/serving/llama_common.cpp actors/serving/llama_drafts.cpp actors/serving/sound_files.cpp
.venv/ready: requirements/lock.txt requirements/llama.txt pyproject.toml $(BUILT)
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) setup/environment.py $(if $(variant),--variant $(variant))

demo: .venv/ready
	@$(BIN)/python -m arriero demo

# Three processes for two cores: those that start a Ray wait a lot, so two share what these leave. What the first two say is
# shown when the third has ended. Ray's processes have a niceness of 15. The others have it, too, or Ray's would get next to no
# time beside them.
TEST := $(BIN)/python -m pytest --durations=15
MODELS := tests/serving tests/costs tests/demo tests/docs tests/repository
OTHERS := tests/actors tests/cli tests/cluster tests/core tests/devices tests/fuzz tests/gateway tests/hub
test: .venv/ready
	@$(TEST) -m ray > .venv/tests-with-ray.log 2>&1 & with_ray=$$!; \
	nice -n 15 $(TEST) -m "not ray" $(MODELS:%=--ignore=%) > .venv/other-tests.log 2>&1 & others=$$!; \
	trap "kill $$with_ray $$others" INT TERM; \
	nice -n 15 $(TEST) -m "not ray" $(OTHERS:%=--ignore=%); status=$$?; \
	wait $$others; status=$$((status | $$?)); wait $$with_ray; status=$$((status | $$?)); \
	cat .venv/other-tests.log .venv/tests-with-ray.log; exit $$status

# Two processes for two cores; HALF takes about as long as all the rest. Tests that take a second or more are left out.
QUICK := $(BIN)/python -m pytest -q -m "not ray and not llama and not slow"
HALF := tests/core tests/actors tests/cli tests/costs
quick: .venv/ready
	@$(MAKE) --no-print-directory --jobs=2 --output-sync quick-half quick-rest

quick-half:
	$(QUICK) $(HALF)

quick-rest:
	$(QUICK) $(HALF:%=--ignore=%)

check: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/docs tests/repository

bench: .venv/ready
	$(BIN)/python -m benchmarks

lock:
	UV_PYTHON_DOWNLOADS=never uv pip compile pyproject.toml --group development --group build --universal --python-version 3.10 \
	  --generate-hashes --upgrade --no-emit-package llama-cpp-python --no-emit-index-url --no-annotate --no-header --quiet \
	  --output-file requirements/lock.txt

bump: .venv/ready
	@$(BIN)/python setup/bump.py "$(VERSION)" --ask-first "$(ASK_FIRST)"

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
