.PHONY: quality style test slow

CODE = diffusers_ctrl training tests benchmarks docs setup.py

# Style and the import order: seconds.
quality:
	ruff check $(CODE)
	ruff format --check $(CODE)
	python -m pytest -q tests/test_dag.py

# Rewrites the files so that `make quality` passes, where a tool can.
style:
	ruff check --fix $(CODE)
	ruff format $(CODE)

test:
	python -m pytest -q

# The long checks only; this -m replaces the one in pyproject.toml.
slow:
	python -m pytest -q -m slow
