# make demo   see the three guarantees kept on a real Kafka while workers are killed
# make prove  ten minutes of every fault for each guarantee, on three local brokers (DURATION=60 for a minute each)
# make bench  ours beside other clients of Kafka, on one local broker and on three (BENCH="--only consume --rounds 5" for a part)
# make test   lint, types, unit tests, broker tests on one and three brokers, examples, the wheel
# make mutants  whether a proof finds every lie that the library could tell: ten minutes; make test has some of them

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DURATION ?= 600
WORKERS ?= 3
PROOFS := $(addprefix prove-,at-most-once at-least-once exactly-once)

.PHONY: demo prove $(PROOFS) mutants test lint types pytest needs bench bench-dedup lock clean
.DELETE_ON_ERROR:

demo: $(STAMP) needs
	$(BIN)/kafka-guarantees demo

prove: $(PROOFS)

$(PROOFS): prove-%: $(STAMP) needs
	$(BIN)/kafka-guarantees prove $* --duration $(DURATION)

mutants: $(STAMP) needs
	$(BIN)/pytest -m "soak or not soak" tests/test_prove_mutants.py

test: lint types pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Most of it is waiting. Each worker has its brokers, and a file of tests as a whole: 800 MB each. In the order of conftest.py.
pytest: $(STAMP) needs
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The environment: what requirements-dev.lock pins, and this package in editable form.
$(STAMP): pyproject.toml requirements-dev.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-virtualenv -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --require-virtualenv --no-deps --editable .
	touch $@

# Kafka runs on Java 17 or newer, and its jars come by Maven. As root on Debian both are installed where they are missing, and
# so are Redis, PostgreSQL and PgBouncer; elsewhere the tests on those are skipped. policy-rc.d (101: forbidden) keeps them from being
# started as services of the machine.
needs:
	@command -v java >/dev/null && command -v mvn >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends default-jre-headless maven; \
	  else echo "Java 17 or newer and Maven are needed: install them (Debian: apt-get install default-jre-headless maven)" >&2; exit 1; \
	  fi; }
	@missing=; \
	command -v redis-server >/dev/null || missing="redis-server"; \
	command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] || missing="$$missing pgbouncer"; \
	[ -z "$$missing" ] || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    [ -e /usr/sbin/policy-rc.d ] || { \
	      trap 'rm -f /usr/sbin/policy-rc.d' EXIT; printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; }; \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; \
	  else echo "not installed, so that their tests are skipped: $$missing"; \
	  fi; }

bench: $(STAMP) needs
	$(BIN)/python -m benchmarks $(BENCH)

bench-dedup: $(STAMP) needs
	$(BIN)/python benchmarks/dedup.py build/dedup.json

lock:
	uv pip compile --universal --python-version 3.10 --group dev --extra prove --extra redis --extra postgres pyproject.toml --no-header --no-annotate --quiet -o requirements-dev.lock

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
