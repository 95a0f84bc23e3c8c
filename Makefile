.PHONY: quality style test slow bench bench-smoke

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

# In two processes, a file in one of them: every test runs on one thread.
test:
	python -m pytest -q -n 2 --dist loadfile

# The long checks only; this -m replaces the one in pyproject.toml.
slow:
	python -m pytest -q -m slow

# Everything of benchmarks/ that report.py renders. Hours on two cores; what is in benchmarks/results/ already is not run again.
bench:
	python benchmarks/peers.py
	python benchmarks/sample_efficiency.py
	python benchmarks/ablations.py
	python benchmarks/time_to_gap.py
	python benchmarks/critic_reach.py
	python benchmarks/step_time.py
	python benchmarks/label_cost.py
	python benchmarks/report.py

# The same at toy size, to see that it runs: minutes. Writes to runs/.
bench-smoke:
	python benchmarks/smoke.py
	python benchmarks/report.py --check
