# Two commands do it all: `make up` runs the product, `make test` passes its tests.
# They need Python 3.11 and make; everything else goes into .venv.

PYTHON ?= python3.11
EXTRA ?= cpu
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(EXTRA)
# A folder of wheels named by PIP_FIND_LINKS is honoured; otherwise uv picks the torch build for this machine.
TORCH := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend $(if $(filter cpu,$(EXTRA)),cpu,auto))

.PHONY: help venv up down status top doctor test check bench faults router docs clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

venv: $(STAMP) ## make the virtual environment

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "onebox: Python 3.11 is needed and '$(PYTHON)' is not one. Install it, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m uv --version >/dev/null 2>&1 || $(RUN) -m pip install --quiet --disable-pip-version-check uv
	$(RUN) -m uv pip install --quiet --python $(RUN) $(TORCH) --editable '.[$(EXTRA),dev]'
	@touch $@

up: $(STAMP) ## run everything: make up [MODEL=alias|path|hub-id] [ENGINE=vllm|scripted]
	@$(if $(MODEL),ONEBOX_MODEL='$(MODEL)') $(if $(ENGINE),ONEBOX_ENGINE='$(ENGINE)') $(RUN) -m deploy up

down: $(STAMP) ## stop what `make up` started
	@$(RUN) -m deploy down

status: $(STAMP) ## show what runs
	@$(RUN) -m deploy status

top: $(STAMP) ## watch fleet, queue and replies in the terminal
	@$(RUN) -m deploy top

doctor: $(STAMP) ## say what is missing on this machine
	@$(RUN) -m deploy doctor

check: $(STAMP) ## lint, types, import layers
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

test: $(STAMP) ## all tests, with a real model, a real store and a real browser
	$(RUN) -m pytest -m "not bench and not faults" $(ARGS)

bench: $(STAMP) ## measure against peers; writes docs/benchmarks.md
	$(RUN) -m tests.bench $(ARGS)

faults: $(STAMP) ## crash points, planted mistakes and a long storm: make faults [ARGS="--seed 7 --faults 500"]
	$(RUN) -m pytest -m faults
	$(RUN) -m tests.faults $(ARGS)

router: $(STAMP) ## train the router's reader from agents/data: make router [ARGS=--check]
	$(RUN) -m agents.train_router $(ARGS)

docs: $(STAMP) ## write the generated pages
	$(RUN) -m deploy settings > docs/settings.md

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
