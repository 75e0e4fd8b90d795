# Every target sets up what it needs in .venv; nothing but Python >= 3.10 and make has to be there.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
# Errors are shown, and nothing else.
PIP := -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help docs docs-build test-versions demo sweep bench study study-full test test-fast test-loops mutants test-packaging test-products lint types check format dist clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.ready  ## train a recurrent network on English text, clipped, logged and reported (about two minutes)
	@echo "==> Training the demo; try also: $(BIN)/python examples/train.py --help"
	@$(BIN)/python examples/train.py

sweep: $(VENV)/.ready  ## train with each method and three seeds, and print the table of results (about five minutes)
	@echo "==> Training 36 times, as many at once as there are cores; multirun/ keeps the logs"
	$(BIN)/python examples/train.py -m hparams_search=methods experiment=quick hydra/launcher=joblib
	$(BIN)/python examples/results.py --pool seed

bench: $(VENV)/.ready-bench  ## measure what clipping costs on this machine (about ten minutes)
	$(BIN)/python benchmarks/cost/clip.py
	$(BIN)/python benchmarks/cost/trainer.py
	$(BIN)/python benchmarks/cost/sharded.py
	$(BIN)/python benchmarks/cost/growth.py
	$(BIN)/python benchmarks/cost/memory.py
	$(BIN)/python benchmarks/cost/report.py

study: $(VENV)/.ready-bench  ## train a part of the study of clipping, and make its page in outputs/study (minutes)
	@echo "==> Training 80 times, two at once; runs that ended before are kept"
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training/study.py -m study=short
	$(BIN)/python benchmarks/training/gather.py outputs/study outputs/study/results.csv
	$(BIN)/python benchmarks/training/page.py outputs/study/results.csv outputs/study/study.md

study-full: $(VENV)/.ready-bench  ## train all of it, and make docs/study.md anew (an hour and a half; goes on where it stopped)
	@echo "==> Training 975 times, and 230 times for limits by advice"
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training/study.py -m study=full
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training/advise.py
	$(BIN)/python benchmarks/training/gather.py outputs/study benchmarks/training/results.csv
	$(BIN)/python benchmarks/training/page.py benchmarks/training/results.csv docs/study.md

test-fast: $(VENV)/.ready  ## run the quick tests: each method in one configuration, no processes (a minute on two cores)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --fast

test: $(VENV)/.ready  ## run the tests, on all cores (about seven minutes on two)
	@echo "==> Running the tests"
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

mutants: $(VENV)/.ready  ## break ROOM in one place after the other, and list which test notices (hours; tests/kit/mutants.py)
	cd tests && ../$(BIN)/python -m kit.mutants $(ROOM)

test-packaging: $(VENV)/.ready-dev  ## build, install into fresh environments, run a foreign application (three minutes)
	@echo "==> Building and installing the distributions, on Hydra 1.3 and 1.4"
	$(BIN)/python -m pytest -m packaging

test-loops: $(VENV)/.ready-loops  ## train in the loops of Transformers, Stable-Baselines3 and others (two minutes)
	@echo "==> Training in loops that others wrote"
	$(VENV)/loops/bin/python -m pytest tests/loops --numprocesses auto --dist worksteal

test-products: $(VENV)/.ready-dev  ## run every case of the tests of which `make test` takes a sum
	@echo "==> Running the products"
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --products -m product

lint: $(VENV)/.ready-dev  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

types: $(VENV)/.ready-dev  ## check types of the package, strictly
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types docs-build test-packaging test-loops  ## everything a pull request must pass, the tests at the end (15 minutes)
	@$(MAKE) test

format: $(VENV)/.ready-dev  ## rewrite the files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: docs-build  ## build the site, strictly, and serve it at http://127.0.0.1:8000
	@echo "==> Serving outputs/site at http://127.0.0.1:8000; Ctrl+C ends it"
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory outputs/site 8000

docs-build: $(VENV)/.ready-docs  ## build the site into outputs/site; a broken link is an error (three minutes at first)
	@echo "==> Building the site"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

test-versions: $(VENV)/.venv  ## run the quick tests with TORCH=2.14 LIGHTNING=2.6, and record what came of it
	@echo "==> Testing with torch $(TORCH) and Lightning $(LIGHTNING)"
	$(BIN)/python docs/versions.py run $(TORCH) $(LIGHTNING)

dist: $(VENV)/.ready-dev  ## build wheel and sdist into dist/
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove the environment and everything that was written
	rm -rf $(VENV) outputs multirun dist build .pytest_cache .ruff_cache .hypothesis

$(VENV)/.venv:
	@echo "==> Making a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or later is needed, {sys.executable} is {v}; run make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.ready: $(VENV)/.venv pyproject.toml $(CONSTRAINTS) tests/peers.txt
	@echo "==> Installing the package and what it needs (torch is large: this can take minutes)"
	@$(BIN)/python $(PIP) --constraint $(CONSTRAINTS) --editable '.[test]'
	@$(BIN)/python $(PIP) --no-deps --requirement tests/peers.txt
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "==> Installing the development tools"
	@$(BIN)/python $(PIP) --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

# An environment over the other one, so that the other tests run as where none of these libraries is installed.
$(VENV)/.ready-loops: $(VENV)/.ready tests/loops.txt
	@echo "==> Installing the libraries whose loops are tried"
	$(BIN)/python -m venv --clear $(VENV)/loops
	$(VENV)/loops/bin/python -c 'import sys, sysconfig as s; below = sys.argv[1]; print(f"import site; site.addsitedir({below!r})", file=open(s.get_path("purelib") + "/below.pth", "w"))' "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@$(VENV)/loops/bin/python $(PIP) --no-deps --requirement tests/loops.txt
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	@echo "==> Installing what the site needs"
	@$(BIN)/python $(PIP) --constraint $(CONSTRAINTS) --editable '.[docs]'
	@touch $@

$(VENV)/.ready-bench: $(VENV)/.ready
	@echo "==> Installing what the benchmarks need"
	@$(BIN)/python $(PIP) --constraint $(CONSTRAINTS) --editable '.[bench]'
	@touch $@
