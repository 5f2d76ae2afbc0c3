# Everything a person needs: make train, make test, make check, make docs, make dist, make bench.
# EXTRAS=tpu (or cuda) adds optional dependencies, for example `make test EXTRAS=tpu`.
PYTHON ?= python3
EXTRAS ?=
comma := ,
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)
install = $(if $(UV),uv pip install --quiet --python $(1),$(1) -m pip install --quiet)
WITH = $(if $(EXTRAS),$(comma)$(EXTRAS))
PYTEST = JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto

.PHONY: train test test-all check docs dist bench
train: .venv/examples
	$(BIN)/python examples/language_model.py --compare $(ARGS)

test: .venv/test$(EXTRAS)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/test$(EXTRAS)
	$(PYTEST) $(ARGS)

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

# One stamp per set of extras. A change of pyproject.toml installs the extras again.
.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(call install,$(BIN)/python) -e ".[$(if $(filter test%,$*),test$(WITH),$*)]"
	touch $@
