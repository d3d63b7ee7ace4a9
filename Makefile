# Every target works in a fresh clone: it needs Python 3.11 or newer and PyPI, and no database. uv is used where it is found.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
TEST_PROCESSES ?= 3
BENCH_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint soak mutants bench docs

demo: $(READY)
	$(BIN)/durable demo

test: $(READY)
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# SOAK_SECONDS and SOAK_SEED in the environment choose its length and what happens in it.
soak: $(READY)
	$(BIN)/python -m tests.faults

# Weakened engines that the tests must notice; MUTANTS names some of them. Takes minutes.
mutants: $(READY)
	$(BIN)/python -m tests.faults.mutants $(MUTANTS)

# BENCH_ARGS are the options of `python -m benchmarks`; see benchmarks/README.md.
bench: $(READY)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# pip knows dependency groups from 25.1 on.
$(READY): pyproject.toml uv.lock
	@if command -v uv >/dev/null; then \
		UV_PROJECT_ENVIRONMENT='$(VENV)' uv sync --frozen --all-extras --all-groups; \
	else \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")' && \
		echo 'Installing what development needs into $(VENV): this takes a minute or two.' && \
		$(PYTHON) -m venv '$(VENV)' && \
		$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' && \
		$(BIN)/python -m pip install --quiet --editable '.[embedded,psycopg,telemetry,cli]' --group dev; \
	fi
	@touch $@
