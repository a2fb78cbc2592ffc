# `make` alone lists the targets. VENV=/path reuses a virtual environment; an active one is used as it is.

PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
ARGS ?=

bin := $(VENV)/bin
# The stamp's name holds what an install depends on: the pins and the checkout it points at.
pins := $(shell (pwd; cat pyproject.toml constraints.txt) | sha256sum | cut -c1-16)
stamp := $(VENV)/.mowe_ray-$(pins)

.PHONY: help install train check quick test-fast test-integration test test-gpu soak
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

install: $(stamp) ## make the virtual environment with the pinned versions

$(stamp):
	@test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.mowe_ray-*
	@echo "installing into $(VENV) (torch is large: minutes the first time)"
	@$(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,serve]'
	@touch $@

train: install ## train the quickstart model (CPU, offline); ARGS='training.max_steps=10' overrides
	@$(bin)/python -m mowe_ray.train --config quickstart $(ARGS)

check: install ## formatting, lint, types, import floors
	@$(bin)/ruff format --check --quiet .
	@$(bin)/ruff check --quiet .
	@$(bin)/mypy --no-error-summary
	@$(bin)/lint-imports --no-logo

# Tests that start no Ray run in three processes on two cores, as some of them wait; torch uses one thread in each
# (tests/conftest.py). Those that do run one after the other: two clusters make their time limits a matter of luck.
fast := $(bin)/python -m pytest --ignore=tests/integration -n 3 --durations=10

quick: check ## `check`, and the tests without the slow ones: the loop while writing (a minute)
	@$(fast) -m "not slow and not gpu and not soak" $(ARGS)

test-fast: install ## every test that starts no Ray
	@$(fast) $(ARGS)

test-integration: install ## real commands on real clusters; PART=shared or PART='not shared' runs one half
	@$(bin)/python -m pytest tests/integration --durations=10 $(if $(PART),-m "$(PART) and not gpu and not soak") $(ARGS)

# Real commands wait for one another a third of the time, in which the tests without Ray get done: at the lowest priority, since
# Ray gives its workers a low one too, and no time limit is to be near.
test: install ## every test that needs no GPU and is not marked soak, as CI does (19 minutes on two cores)
	@nice -n 19 $(MAKE) --no-print-directory test-fast ARGS='-q $(ARGS)' & fast=$$!; \
	$(MAKE) --no-print-directory test-integration; slow=$$?; \
	wait $$fast && exit $$slow

test-gpu: install ## what needs a CUDA device; two devices for all of it
	@$(bin)/python -m pytest -m gpu --durations=10 $(ARGS)

soak: install ## what repeats `test` on other settings, and faults for minutes (hours); prints what it cost
	@$(bin)/python -m pytest -m "soak and not gpu" -s --durations=0 --durations-min=1 $(ARGS)
