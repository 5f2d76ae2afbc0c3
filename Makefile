# The commands for a checkout: make train, make test, make check, make docs, make dist, make bench.
# EXTRAS=tpu (or cuda) adds optional dependencies, for example `make test EXTRAS=tpu`.
PYTHON ?= python3
EXTRAS ?=
comma := ,
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)
install = $(if $(UV),uv pip install --quiet --python $(1),$(1) -m pip install --quiet)
pip_with_groups = $(if $(UV),,$(1) -m pip install --quiet "pip>=25.1")
WITH = $(if $(EXTRAS),$(comma)$(EXTRAS))
PYTEST = JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto
quick = XLA_FLAGS="$$($(1) .ci/quick_flags.py)"

.PHONY: train test test-all test-oldest fuzz check docs dist bench
train: .venv/examples
	$(BIN)/python examples/language_model.py --compare $(ARGS)

test: .venv/test$(EXTRAS)
	$(call quick,$(BIN)/python) $(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/test$(EXTRAS)
	$(PYTEST) $(ARGS)

# `make test` with the lowest versions that pyproject.toml allows, on the lowest Python. The libraries of that time use
# names that JAX has deprecated since, so that a DeprecationWarning is not an error here.
test-oldest: .venv/oldest/installed
	$(call quick,.venv/oldest/bin/python) JAX_PLATFORMS=cpu .venv/oldest/bin/python -m pytest -n auto -m "not slow and not recent_compiler" \
		-W ignore::DeprecationWarning $(ARGS)

# Random inputs for the functions that handle states, for so many seconds. `make test` replays the seeds that failed once.
SECONDS ?= 600
fuzz: .venv/test$(EXTRAS)
	$(call quick,$(BIN)/python) JAX_PLATFORMS=cpu $(BIN)/python -W ignore -m tests.fuzz --seconds $(SECONDS)

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# The site, in docs/_build/html; its notebooks run. A warning is an error.
docs: .venv/docs
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html $(ARGS)

# What a release uploads, in dist/: built, its metadata checked, and the wheel tried in an environment of its own.
dist: .venv/dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear .venv/bare
	$(call install,.venv/bare/bin/python) dist/*.whl
	cd .venv/bare && JAX_PLATFORMS=cpu bin/python -I ../../.ci/smoke.py

# Every benchmark that this machine can run, then the tables and pictures of the documentation.
# `python -m benchmarks --list` names them, and `python -m benchmarks NAME` runs one.
bench: .venv/examples
	$(BIN)/python -m benchmarks all $(ARGS)

# One stamp per dependency group of pyproject.toml. A change of that file installs the group again.
.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(call pip_with_groups,$(BIN)/python)
	$(call install,$(BIN)/python) -e ".[examples$(WITH)]" $(addprefix --group ,$(patsubst test%,test,$(filter-out examples,$*)))
	touch $@

.venv/oldest/installed: pyproject.toml .ci/lowest_versions.py
	$(if $(UV),uv venv --quiet --clear --python 3.11,python3.11 -m venv --clear) .venv/oldest
	$(call pip_with_groups,.venv/oldest/bin/python)
	.venv/oldest/bin/python .ci/lowest_versions.py > .venv/oldest/constraints.txt
	$(call install,.venv/oldest/bin/python) -c .venv/oldest/constraints.txt -e ".[examples]" --group test
	touch $@
