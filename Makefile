# `make` alone lists the targets. VENV=/path reuses a virtual environment; an active one is used as it is.

PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
ARGS ?=

bin := $(VENV)/bin
# The stamp's name holds what an install depends on: the pins and the checkout it points at.
pins := $(shell (pwd; cat pyproject.toml constraints.txt) | sha256sum | cut -c1-16)
stamp := $(VENV)/.mowe_ray-$(pins)

.PHONY: help install train test test-fast check
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(stamp) ## make the virtual environment with the pinned versions

$(stamp):
	@test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.mowe_ray-*
	@echo "installing into $(VENV) (torch is large: minutes the first time)"
	@$(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: install ## train the quickstart model (CPU, offline); ARGS='training.max_steps=10' overrides
	@$(bin)/python -m mowe_ray.train --config quickstart $(ARGS)

test: install ## run every test that needs no GPU
	@$(bin)/python -m pytest $(ARGS)

test-fast: install ## run the tests that take seconds
	@$(bin)/python -m pytest -m "not slow and not gpu" $(ARGS)

check: install ## formatting, lint, types, import floors
	@$(bin)/ruff format --check --quiet .
	@$(bin)/ruff check --quiet .
	@$(bin)/mypy --no-error-summary
	@$(bin)/lint-imports --no-logo
