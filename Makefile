# Every target makes .venv-make by itself, never the .venv that a user may have. It is installed into again only when a
# pyproject.toml, the pins or the list of development tools changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
BENCH ?= core

VENV := .venv-make
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install -qq --disable-pip-version-check --no-build-isolation -c constraints.txt
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

.PHONY: help demo test test-fast test-all test-services lint docs bench wheels clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo          see one callback at work on real data; ARGS="--seeds 5", ARGS="--help"'
	@echo 'make test          run the tests; ARGS="tests/test_idx.py -v"'
	@echo 'make test-fast     those without a mark, on all cores; ARGS="--cov" prints the coverage'
	@echo 'make test-all      every test, the exhaustive ones included'
	@echo 'make test-services the tests of core, each time without one of its services'
	@echo 'make lint          ruff, mypy and the layers of the packages'
	@echo 'make docs          build the documentation into site/'
	@echo 'make bench         measure what core costs; ARGS="--quick"'
	@echo 'make wheels        build the wheels of core and of each plugin into dist/'
	@echo 'make clean         remove everything that make made'
	@echo 'PYTHON=...         the Python (>= 3.11) that $(VENV) is made with'

demo: $(VENV)/.demo
	@$(RUN) examples/demo.py $(ARGS)

test: $(VENV)/.dev
	@$(RUN) -m pytest -m 'not exhaustive' -n logical --maxprocesses 8 $(ARGS)

# Each worker has a torch of its own, so a large machine gets no more than eight.
test-fast: $(VENV)/.dev
	@$(RUN) -m pytest -m 'not (slow or ddp or browser or exhaustive)' -n logical --maxprocesses 8 $(ARGS)

test-all: $(VENV)/.dev
	@$(RUN) -m pytest $(ARGS)

test-services: $(VENV)/.dev
	@$(RUN) core/tests/without_service.py $(ARGS)

lint: $(VENV)/.dev
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports --no-logo

docs: $(VENV)/.dev
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

bench: $(VENV)/.dev
	@$(RUN) benchmarks/$(BENCH).py $(ARGS)

# Without build isolation: the pinned setuptools is used. A build folder of an earlier time would end up in the wheel.
wheels: $(VENV)/.dev
	@rm -rf dist core/build plugins/*/build
	@for package in core $(PLUGINS); do \
	    $(RUN) -m pip wheel -qq --disable-pip-version-check --no-build-isolation --no-deps -w dist ./$$package || exit 1; \
	done; ls dist

clean:
	@rm -rf $(VENV) dist site build groundwire-aol groundwire-demo groundwire-limes core/build plugins/*/build */src/*.egg-info plugins/*/src/*.egg-info
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage*

$(VENV)/.made:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'groundwire needs Python >= 3.11, and "$(PYTHON)" is not: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo 'Making $(VENV)'
	@'$(PYTHON)' -m venv --clear $(VENV)
	@touch $@

# Torch is the largest download by far, so it gets a line of its own. setuptools builds the editable packages.
$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@echo 'Installing torch (the longest step; only once)'
	@$(INSTALL) setuptools torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch core/pyproject.toml plugins/cram/pyproject.toml
	@echo 'Installing groundwire, CrAM and scikit-learn'
	@$(INSTALL) scikit-learn -e ./core -e ./plugins/cram
	@touch $@

$(VENV)/.dev: $(VENV)/.demo requirements-dev.txt $(addsuffix /pyproject.toml,$(PLUGINS))
	@echo 'Installing all plugins and what the tests need'
	@$(INSTALL) -r requirements-dev.txt $(addprefix -e ./,$(PLUGINS))
	@touch $@
