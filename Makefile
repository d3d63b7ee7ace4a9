# Every target works in a fresh clone: it needs Python 3.11 or newer and PyPI, and no database. uv is used where it is found.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
TEST_PROCESSES ?= 3
VERIFY_PROCESSES ?= 2
BENCH_ARGS ?=

BIN := $(VENV)/bin
# What running and testing need, and what everything here needs: type checkers, web frameworks, the site's generator.
TEST_READY := $(VENV)/.ready-test
READY := $(VENV)/.ready

.PHONY: demo test verify lint soak mutants bench docs reference

demo: $(TEST_READY)
	$(BIN)/durable demo

# Minutes; needs no database. PYTEST_ARGS='-k retries' chooses tests.
test: $(TEST_READY)
	$(BIN)/pytest -m "not slow" --numprocesses $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

# What takes longer: faults, races, whole processes, the docs' pages, and engines weakened on purpose.
verify: $(READY)
	$(BIN)/pytest -m slow --numprocesses $(VERIFY_PROCESSES) --dist worksteal $(PYTEST_ARGS)
	$(BIN)/pytest tests/verification --numprocesses $(VERIFY_PROCESSES) --dist loadfile $(PYTEST_ARGS)
	SOAK_SECONDS=$${SOAK_SECONDS:-300} $(MAKE) soak
	$(MAKE) mutants

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY) reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The pages of docs/reference are written from the docstrings, and docs/hot-statements.md from the statements.
reference: $(READY)
	$(BIN)/python docs/reference/generated.py
	$(BIN)/python docs/hot_statements.py

# SOAK_SECONDS and SOAK_SEED in the environment choose its length and what happens in it.
soak: $(READY)
	$(BIN)/python -m tests.verification

# Weakened engines that the tests must notice; MUTANTS names some of them. Takes minutes.
mutants: $(READY)
	$(BIN)/python -m tests.verification.mutants $(MUTANTS)

# BENCH_ARGS are the options of `python -m benchmarks`; see benchmarks/README.md.
bench: $(READY)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# $(call install,GROUP) installs the package with every extra, and a dependency group. pip knows groups from 25.1 on.
define install
	@if command -v uv >/dev/null; then \
		UV_PROJECT_ENVIRONMENT='$(VENV)' uv sync --frozen --inexact --all-extras --no-default-groups --group $(1); \
	else \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")' && \
		echo 'Installing what $(1) needs into $(VENV): this takes a minute or two.' && \
		$(PYTHON) -m venv '$(VENV)' && \
		$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' && \
		$(BIN)/python -m pip install --quiet --editable '.[embedded,psycopg,telemetry,pydantic-ai,cli,dashboard]' --group $(1); \
	fi
	@touch $@
endef

$(TEST_READY): pyproject.toml uv.lock
	$(call install,test)

$(READY): pyproject.toml uv.lock
	$(call install,dev)
	@touch $(TEST_READY)
