# Every target makes the environment that it needs, once; it needs Python 3.11 or later and make.
#   make demo [SEED=0]      a model from nothing: trained on three rewards, served, asked
#   make test | test-full   the fast tests | all of them
#   make test-vllm          those that need vLLM, in the benchmarks' environment
#   make lint | format      what CI checks | what puts most of it right
#   make docs               write the generated pages again
#   make bench NAME=rl_step [QUICK=1] [JSON=FILE]

# Chosen when an environment is made; override with PYTHON=...
PYTHON = $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN = .venv/bin
ENV_READY = .venv/.installed
BENCH_READY = .venv-bench/.installed

# torch comes first and with its own dependencies, since an index's build brings CUDA libraries that a CPU wheel
# does not; everything else is exactly what the lock says.
define make_environment
	@test -n "$(PYTHON)" || { echo "thornback needs Python 3.11 or later: none was found; name one with PYTHON=..." >&2; exit 1; }
	@echo "Installing $(2) into $(1), once: this takes some minutes."
	rm -f $(1)/.installed
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -qq --constraint $(2) torch==2.13.0
	$(1)/bin/python -m pip install -qq --no-deps --requirement $(2)
	$(1)/bin/python -m pip install -qq --no-deps --no-build-isolation --editable .
	touch $(1)/.installed
endef

.PHONY: help venv demo test test-full test-slow test-vllm lint format docs bench
help:
	@sed -n '2,7s/^# *//p' Makefile

venv: $(ENV_READY)

$(ENV_READY): requirements.lock
	$(call make_environment,.venv,requirements.lock)

$(BENCH_READY): requirements-bench.lock
	$(call make_environment,.venv-bench,requirements-bench.lock)

demo: venv
	$(BIN)/python -m thornback demo $(if $(SEED),--seed $(SEED))

# What computes on one core goes two at a time; what starts Ray has the machine for itself.
ONE_CORE = tests/algorithms tests/contracts tests/engine
VLLM_TESTS = $(addprefix tests/engine/test_vllm_,engine.py speculation.py hand_over.py) tests/actors/test_vllm_rollouts.py tests/serve/test_vllm.py
define run_tests
	$(BIN)/python -m pytest -m $(1) -n 2 $(ONE_CORE)
	$(BIN)/python -m pytest -m $(1) $(ONE_CORE:%=--ignore=%)
endef

test: venv
	$(call run_tests,"not full")

test-slow: venv
	$(call run_tests,full)

test-full: test test-slow test-vllm

test-vllm: $(BENCH_READY)
	.venv-bench/bin/python -m pytest $(VLLM_TESTS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: venv
	$(BIN)/python -m docs.make_configuration

bench: $(BENCH_READY)
	@test -n "$(NAME)" || { echo "Which benchmark? make bench NAME=rl_step; see benchmarks/." >&2; exit 1; }
	.venv-bench/bin/python -m benchmarks.$(NAME) $(if $(QUICK),--quick) $(if $(JSON),--json $(JSON))
