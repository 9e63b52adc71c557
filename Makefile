# Everything a user or a developer runs. `make` alone lists it.
#
#   make venv TORCH="torch==2.13.0 --index-url URL"   another build of PyTorch (a CUDA or ROCm one)
#   make test WORKERS=8                               more test processes than two

PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch==2.13.0
WORKERS ?= 2
PROMPT  ?= def load_config(path):

BIN     := $(VENV)/bin
ATOMC   := $(BIN)/atomc
STAMP   := $(VENV)/.stamp
# One thread a process: tests run in WORKERS processes already.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help venv demo test kernels check lint bench clean distclean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */\1\t/' | expand -t 12

venv: $(STAMP)  ## make the virtual environment (again, when pyproject.toml changed)

# PyTorch first and pinned: a bare range may bring a build of several GB for a GPU that is not there.
$(STAMP): pyproject.toml tests/requirements-no-deps.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "atomc needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements-no-deps.txt
	touch $@

demo: venv  ## compile a small, trained DeepSeek-V4, explain it, generate text; then compile it for an MI355X
	@mkdir -p build
	$(ATOMC) compile deepseek-v4-nano --target cpu -o build/nano.atom
	$(ATOMC) explain build/nano.atom
	$(ATOMC) verify build/nano.atom
	$(ATOMC) generate build/nano.atom "$(PROMPT)" --max-tokens 120 --temperature 0.9 --top-p 0.95 --seed 3 --stats
	@echo
	@echo '# For a GPU target every kernel is compiled here, without the GPU:'
	$(ATOMC) compile deepseek-v4-nano --target mi355x -o build/nano-mi355x.atom

test: venv  ## every test that needs no GPU
	$(PYTEST) --durations=10

kernels: venv  ## every case of every kernel: in the interpreter, and compiled for every target
	$(PYTEST) --every-kernel --durations=10 tests/kernels

check: lint  ## lint and the fast tests: before every commit
	$(PYTEST) -m "not slow"

lint: venv  ## ruff, mypy --strict, the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p atomc
	$(BIN)/lint-imports --no-logo

bench: venv  ## speed of the compiled nano model on this machine
	@mkdir -p build
	$(ATOMC) compile deepseek-v4-nano --target cpu -o build/nano.atom
	$(BIN)/python benchmarks/generate.py build/nano.atom

clean:  ## remove what was built (keeps the virtual environment)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find atomc passes codegen runtime models tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the virtual environment too
	rm -rf $(VENV)
