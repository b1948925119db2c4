# Everything one does here. `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench clean format
# pytest's arguments: make test ARGS='tests/unit -x'
ARGS ?=

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing (Debian packages, system user, Python environment); root
	@scripts/setup

demo: ## set up, start node and server, open this repository as a workspace; leaves it running; root
	@scripts/demo

test: ## run all tests: unit, integration, e2e, on real parts; root
	@scripts/setup --tests
	@"$$(readlink .venv)/bin/python" -m pytest $(ARGS) # by its real path: the server's user may not see this folder

check: ## format, lint, types, import floors, generated pages: the state of the tree, no root parts started
	@scripts/setup
	@scripts/check

format: ## rewrite the sources in the project's format
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

bench: ## measure the claims of speed; a ratio against a peer each; root
	@scripts/setup
	@scripts/bench $(ARGS)

clean: ## stop and remove what demo and tests made; packages, environment and downloads stay; root
	@if command -v python3 >/dev/null; then scripts/clean; else echo 'clean: nothing to remove (without python3 nothing ran)'; fi
