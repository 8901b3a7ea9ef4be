.PHONY: install test format lint ci

install:  ## The package and what its tests need, editable.
	pip install -e ".[test]"

test:  ## What README's second command runs.
	pytest

format:  ## Rewrite the sources as CI wants them.
	ruff format . && ruff check --fix .

lint:  ## What CI asks before it runs tests.
	ruff format --check . && ruff check . && pyright

ci:  ## Everything CI runs, in a fresh virtual environment.
	.ci/run
