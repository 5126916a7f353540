# The front door. Every target that needs .venv fills it first, in well under a second when it is full.
#   ARGS    goes to the command behind the target: make demo ARGS=--exit
#   DEVICE  auto (an NVIDIA GPU when there is one), cpu or cuda

ARGS =
DEVICE = auto
BIN = .venv/bin

PYTHON = $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null \
	&& command -v $$python && break; done)

# The four that come as a CPU or a CUDA build under one name and version; only torch is installed, before the lock.
UNLOCKED = torch torchvision torchaudio torchcodec
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--exclude-newer "7 days" --custom-compile-command "make lock" --no-annotate \
	$(foreach name,$(UNLOCKED),--no-emit-package $(name)) $(ARGS)

BENCHMARKS = $(subst /,.,$(patsubst %/__main__,%,$(basename $(shell grep -rl '^if __name__ == ' benchmarks --include=*.py))))

.PHONY: help setup demo up test check static bench lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

setup: ## create .venv and install what the lock file names
	@python=$(PYTHON); test -n "$$python" || { echo "setup: no Python from 3.11 to 3.14 found on PATH"; exit 1; }; \
	$$python requirements/install.py $(DEVICE)

demo: setup ## the whole circle on this machine; make demo ARGS=--exit stops at its end
	@$(BIN)/bonsai demo $(ARGS)

up: setup ## start everything and keep it running
	@$(BIN)/bonsai up $(ARGS)

test: static ## every check and every test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not stack" --numprocesses=auto --dist=worksteal $(ARGS)
	$(BIN)/pytest -m stack $(ARGS)

check: static ## the fast part: format, lint, types, imports, the tests that take no time
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not stack and not slow" --numprocesses=auto --dist=worksteal $(ARGS)

static: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## every benchmark in turn; make bench BENCHMARKS=benchmarks.circle runs one
	@set -e; for module in $(BENCHMARKS); do $(BIN)/python -m $$module $(ARGS); done

lock: setup ## write the lock files anew; make lock ARGS=--upgrade takes newer versions
	$(BIN)/python -m pip install -qq --no-deps --require-hashes -r requirements/uv.txt
	$(COMPILE) pyproject.toml requirements/cpu.in --all-extras --overrides requirements/cpu.overrides -o requirements/cpu.txt
	$(COMPILE) pyproject.toml requirements/cuda.in --all-extras -o requirements/cuda.txt
	$(COMPILE) pyproject.toml --extra serve -c requirements/cpu.txt -o requirements/gateway.txt
	$(COMPILE) requirements/uv.in -o requirements/uv.txt
	$(COMPILE) requirements/clients/langchain.in -o requirements/clients/langchain.txt
	$(COMPILE) requirements/clients/lm_eval.in -o requirements/clients/lm_eval.txt
	$(COMPILE) requirements/clients/moto.in -o requirements/clients/moto.txt
	$(COMPILE) requirements/clients/schemathesis.in -o requirements/clients/schemathesis.txt
	$(COMPILE) requirements/peers/litellm.in -o requirements/peers/litellm.txt
	$(COMPILE) requirements/peers/optillm.in --overrides requirements/peers/optillm.overrides -o requirements/peers/optillm.txt
	$(COMPILE) requirements/peers/tensorzero.in -o requirements/peers/tensorzero.txt
	$(COMPILE) requirements/tools/py_spy.in -o requirements/tools/py_spy.txt

clean: ## remove .venv, caches and build leftovers; .bonsai, where the data lives, stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
