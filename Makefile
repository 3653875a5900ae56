# The set-up that demo and test share is the file .venv/installed; it is made again when the dependencies change.
PYTHON ?= python3
MODEL ?=
DEMO_ARGS ?=

.PHONY: install demo serve test lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	touch $@

demo: install
	.venv/bin/python -m benchmarks.demo $(if $(MODEL),--model '$(MODEL)') $(DEMO_ARGS)

serve: install
	.venv/bin/isochunk serve

# One thread a process: with tests on all cores, torch's threads mostly wait for each other. Files in their order: by
# the number of their tests, which is xdist's order, the few long tests that start ranks would come last and alone.
test: install
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv demo-out
