# Two commands: `make train` (MNIST, from nothing to a report) and `make test` (everything CI runs).
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/mnist.yaml
RUN ?= runs/$(basename $(notdir $(CONFIG)))
OPTIONS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt

.PHONY: help train test test-lowest quick lint docs install golden clean

help:
	@echo "make train   install, fetch and pack MNIST, train on this machine, evaluate   [CONFIG=configs/x.yaml RUN=runs/x OPTIONS=--seed=1]"
	@echo "make test    install with the test tools; ruff, mypy --strict, pytest"
	@echo "make test-lowest    the tests of ranks and engines with the lowest supported Accelerate and DeepSpeed"
	@echo "make quick   the inner loop: lint and the tests that are not slow"
	@echo "make docs    write docs/settings.md from the code; build the pages of docs/ as a site in build/site"
	@echo "make clean   remove the virtual environment and caches (data/ and runs/ stay)"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml benchmarks/baselines/pyproject.toml launch/constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e . -e benchmarks/baselines
	@touch $@

$(VENV)/.tested: pyproject.toml benchmarks/baselines/pyproject.toml launch/constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[test]' -e benchmarks/baselines
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed

train: $(VENV)/.installed
	$(BIN)/accelerate launch --quiet pipeline/train.py --config $(CONFIG) --run.path $(RUN) $(OPTIONS)
	$(BIN)/naign evaluate $(RUN)
	@echo
	@echo "report       $(RUN)/evaluation/report.html"
	@echo "TensorBoard  $(BIN)/tensorboard --logdir $(RUN)/tensorboard"
	@echo "model        $$(ls -d $(RUN)/checkpoints/step-* | tail -n 1)/model.safetensors"

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# A second environment that borrows everything else, torch above all, from the first.
$(VENV)-lowest/.installed: launch/constraints-lowest.txt | $(VENV)/.tested
	$(BIN)/python -m venv $(VENV)-lowest
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"), "$(CURDIR)/benchmarks/baselines", sep="\n")' > \
	    "$$($(VENV)-lowest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-lowest: $(VENV)-lowest/.installed
	PYTHONPATH=$(CURDIR) $(VENV)-lowest/bin/python -m pytest tests/distributed tests/e2e/test_engines.py

quick: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

docs: $(VENV)/.tested
	$(BIN)/python docs/settings.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A copy rather than a link, so that `kubectl apply -f` takes its address in a repository, too.
k8s/job.yaml: k8s/base/job.yaml
	{ echo "# Generated from k8s/base/job.yaml, which is the one to edit, by: make k8s/job.yaml"; cat $<; } > $@

golden: $(VENV)/.tested
	$(BIN)/python -m tests.golden

clean:
	rm -rf $(VENV) $(VENV)-lowest *.egg-info .pytest_cache .mypy_cache .ruff_cache
