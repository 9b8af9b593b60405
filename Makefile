# Two commands do everything on a machine with Python 3.11: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# The environment is right when it was made from exactly these two files, for the code in this folder.
LOCKED := $(shell { cat requirements.lock pyproject.toml; pwd; } | cksum | tr -d ' ')
STAMP := $(VENV)/.installed-$(LOCKED)

.PHONY: demo demo-runpod demo-serve live-smoke test test-slow test-long bench lock clean

demo: $(STAMP)  ## trains the smoke recipe on the example training set, to a verified adapter
	$(BIN)/lorry run smoke/zero3 --training-set examples/bicycle-care.jsonl

demo-runpod: $(STAMP)  ## the web app's way on a local Runpod: submit by HTTP, train in a Pod, download, bill, no Pod left
	$(BIN)/python examples/demo_runpod.py

demo-serve: $(STAMP)  ## two adapters trained, evaluated, proven on a server here, and back to the first
	$(BIN)/python examples/demo_serve.py

live-smoke: $(STAMP)  ## one real Pod, for less than a dollar: shows the quote, and spends only with LORRY_LIVE_SMOKE=yes
	$(BIN)/python -m scripts.live_smoke

test: $(STAMP)  ## lint, types and the tests that are quick
	$(BIN)/python -m pytest -m "not slow and not long" -n 2 --dist loadfile

test-slow: $(STAMP)  ## the long cycles
	$(BIN)/python -m pytest -m "slow and not long" -n 2 --dist loadfile

test-long: $(STAMP)  ## hundreds of seeded worlds, nodes that die, jobs that train for real on each cloud: before a release
	$(BIN)/python -m pytest -m long -n 2 --dist loadfile

bench: $(STAMP)  ## ratios against named peers, printed and written to benchmarks/results.json
	$(BIN)/python -m benchmarks

# torch first and by its plain version, so that a CPU build at hand is taken where one is offered.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed; this is " + sys.version.split()[0] + ". Name one: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	rm -f $(VENV)/.installed-*
	touch $(STAMP)

# What the images install is for Linux with CUDA, whatever this machine is.
RESOLVE := build/lock/bin/uv pip compile --quiet --no-annotate --no-header --no-build-isolation --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --constraint requirements.lock

lock:  ## resolves the pins of pyproject.toml afresh: requirements.lock, and the locks of the images
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0
	build/lock/bin/pip install --quiet --editable '.[train,gateway,runpod,terraform,test]'
	build/lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
	build/lock/bin/pip install --quiet uv==0.13.9
	$(RESOLVE) --extra train --extra runpod pyproject.toml infra/image/kernels.in -o infra/image/trainer.lock
	$(RESOLVE) --extra gateway pyproject.toml -o infra/image/gateway.lock

clean:
	rm -rf $(VENV) build jobs .pytest_cache .mypy_cache .ruff_cache
