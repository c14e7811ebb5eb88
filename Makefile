# Each of these sets up what it needs and no more: .venv, and for `make test-newest` .venv-newest.

# The first of these commands that runs.
first_of = $(shell for python in $(1); do $$python -c "" 2>&- && echo $$python && break; done)
PYTHON ?= $(call first_of,python3.11 python3.12 python3.13 python3.14 python3)
NEWEST_PYTHON ?= $(call first_of,$(foreach v,3.14 3.13 3.12,python$(v) $(wildcard $(HOME)/.pyenv/versions/$(v).*/bin/python)))
NEWEST_EXTRAS ?= test,data
# Without compiling every module at once: those that are used are compiled at their first import.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
# Containers often tell Python to keep no bytecode: each process would compile all of JAX anew, for
# longer than its import takes, and tests start dozens.
export PYTHONDONTWRITEBYTECODE :=
BIN := .venv/bin
NEWEST := .venv-newest

.PHONY: demo test test-long test-newest lint clean

demo: .venv/for-demo
	$(BIN)/python -m tools.demo

test: .venv/for-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Those that alone take minutes: the demo, and runs that are killed at random moments.
test-long: .venv/for-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long

lint: .venv/for-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# With the newest releases that pyproject.toml allows instead of constraints.txt. Without torch, which
# brings gigabytes of CUDA: tests that need it are skipped, unless NEWEST_EXTRAS=test,data,parity is
# given.
test-newest:
ifeq ($(NEWEST_PYTHON),)
	@echo "make test-newest: found no python3.12, python3.13 or python3.14; name one: NEWEST_PYTHON=..." >&2
	@exit 1
else
	$(MAKE) $(NEWEST)/installed
	$(NEWEST)/bin/python -m pip list --disable-pip-version-check | grep -iE '^(jax|flax|orbax-checkpoint|numpy) '
	$(NEWEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
endif

.venv/for-demo: EXTRAS := verify
.venv/for-test: EXTRAS := test,parity,data
.venv/for-lint: EXTRAS := test,parity,data,lint

.venv/for-demo .venv/for-test .venv/for-lint: pyproject.toml constraints.txt
	@echo "Set-up: .venv gets JAX and the extras $(EXTRAS), about a minute ..."
	@$(PYTHON) -m venv .venv
	@began=$$(date +%s); $(BIN)/python $(INSTALL) -c constraints.txt -e ".[$(EXTRAS)]" && \
		echo "Set-up: done in $$(($$(date +%s) - began)) s"
	@touch $@

$(NEWEST)/installed: pyproject.toml
	$(NEWEST_PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) --upgrade --upgrade-strategy eager -e ".[$(NEWEST_EXTRAS)]"
	touch $@

clean:
	rm -rf .venv $(NEWEST) demo-run
