# Two commands: `make train` (MNIST, from nothing to a report) and `make test` (everything CI runs).
PYTHON ?= python3
VENV ?= .venv
# Empty: what `naign train`, which runs `accelerate launch pipeline/train.py`, trains when nothing is said, configs/mnist.yaml.
CONFIG ?=
RUN ?= runs/$(or $(basename $(notdir $(CONFIG))),mnist)
OPTIONS ?=
# GPU=1, of `make install`: FAISS's GPU build that fits torch in the place of faiss-cpu (launch/faiss-gpu/pyproject.toml).
GPU ?=
# What `make test-lowest` installs in the place of this environment's torch, as 'torch==2.10.0 torchvision==0.25.0'.
LOWEST_TORCH ?=
# Of tests, on two cores: one more than these, since some tests wait.
WORKERS ?= 3

# pip compiles nothing below: each module is compiled when it is first imported, and that is kept.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
PIP_INSTALL ?= $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c launch/constraints.txt

# pip's last words often name no cause.
OR_SAY := || { echo "pip failed, see above (room? network? behind a proxy, set HTTPS_PROXY); make continues where it stopped"; exit 1; }

# A worker that has no tests left takes some from the end of another's list.
XDIST := -n $(WORKERS) --dist worksteal
PYTEST := $(BIN)/pytest $(XDIST)
LOWEST := PYTHONPATH="$(CURDIR)/pipeline:$(CURDIR)" $(VENV)-lowest/bin/python -m pytest $(XDIST)

TARGET ?= cpu
VERSION ?=
TORCH_INDEX ?=

.PHONY: help train test pytest test-lowest smoke-lowest quick lint docs install golden constraints dist sbom image models clean

help:
	@echo "make train   install, fetch and pack MNIST, train on this machine, evaluate   [CONFIG=configs/x.yaml RUN=runs/x OPTIONS=--seed=1]"
	@echo "make install GPU=1  install; on a GPU, with FAISS's GPU build in the place of faiss-cpu"
	@echo "make test    install with the test tools; ruff, mypy --strict, pytest"
	@echo "make test-lowest    the tests of ranks and engines with the lowest supported Accelerate and DeepSpeed   [LOWEST_TORCH=torch==2.10.0]"
	@echo "make quick   the inner loop: lint and the tests that are not slow"
	@echo "make docs    write docs/settings.md from the code; build the pages of docs/ as a site in build/site"
	@echo "make dist    the wheel and the source archive, in dist/; make sbom: what the wheel depends on, in build/sbom/"
	@echo "make models  train the recipes of a release, measure, and pack each with its report, in build/models/; hours   [MODELS=mnist]"
	@echo "make image   the container image, by docker   [TARGET=cuda VERSION=0.2.0 TORCH_INDEX=...]"
	@echo "make constraints    pin what pyproject.toml asks for and launch/constraints.txt lacks   [OPTIONS=--upgrade]"
	@echo "make clean   remove the virtual environment and caches (data/ and runs/ stay)"

# What stands in the way of an installation, in one line, before anything is written. Python 2 must be able to parse it.
define CHECK
import os, sys
if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])
import importlib.util, shutil, tempfile
if not importlib.util.find_spec("ensurepip"):
    sys.exit("$(PYTHON) cannot make a virtual environment: on Debian and Ubuntu, apt-get install python3-venv")
for place, remedy in ("$(VENV)", "make VENV=/elsewhere/.venv"), (tempfile.gettempdir(), "TMPDIR=/elsewhere make"):
    place = os.path.abspath(place)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free / 1e9
    if free < $(LEAST_GB):
        sys.exit("%s has %.1f GB free, and an installation needs $(LEAST_GB), or 9 with torch for CUDA: %s ..." % (place, free, remedy))
endef
export CHECK
LEAST_GB := 2

$(VENV)/bin/python:
	@$(PYTHON) -c "$$CHECK"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml benchmarks/baselines/pyproject.toml launch/constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e . -e benchmarks/baselines $(OR_SAY)
	@touch $@

$(VENV)/.tested: pyproject.toml benchmarks/baselines/pyproject.toml launch/constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[test]' -e benchmarks/baselines $(OR_SAY)
	@touch $@ $(VENV)/.installed

$(VENV)/.gpu: launch/faiss-gpu/pyproject.toml launch/faiss-gpu/which.py | $(VENV)/.installed
	faiss=$$($(BIN)/python launch/faiss-gpu/which.py) && \
	    $(BIN)/python -m pip uninstall --quiet --yes faiss-cpu faiss-gpu faiss-gpu-cuvs && \
	    $(PIP_INSTALL) ./launch/faiss-gpu "$$faiss" -e .
	@touch $@

install: $(VENV)/.installed $(if $(filter-out 0,$(GPU)),$(VENV)/.gpu)
	@echo "installed; now: source $(VENV)/bin/activate"

train: $(VENV)/.installed
	$(BIN)/naign train $(if $(CONFIG),--config "$(CONFIG)") --run.path "$(RUN)" $(OPTIONS)
	$(BIN)/naign evaluate "$(RUN)"
	@echo
	@echo "report       $(RUN)/evaluation/report.html"
	@echo "TensorBoard  $(BIN)/tensorboard --logdir $(RUN)/tensorboard"
	@echo "model        $$(ls -d "$(RUN)"/checkpoints/step-* | tail -n 1)/model.safetensors"

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Side by side: mypy keeps one core busy, and the first tests another.
test: $(VENV)/.tested
	@$(MAKE) --no-print-directory -j2 lint pytest

pytest: $(VENV)/.tested
	$(PYTEST)

# A second environment that borrows everything else, torch above all, from the first.
$(VENV)-lowest/.installed: launch/constraints-lowest.txt | $(VENV)/.tested
	$(BIN)/python -m venv $(VENV)-lowest
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"), "$(CURDIR)/benchmarks/baselines", sep="\n")' > \
	    "$$($(VENV)-lowest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(VENV)-lowest/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r $< $(LOWEST_TORCH)
	@touch $@

test-lowest: $(VENV)-lowest/.installed
	$(LOWEST) tests/distributed tests/e2e/test_engines.py tests/e2e/test_more_ranks.py

smoke-lowest: $(VENV)-lowest/.installed
	$(LOWEST) tests/e2e/test_more_ranks.py

quick: lint
	$(PYTEST) -m "not slow"

docs: $(VENV)/.tested
	$(BIN)/python docs/settings.py
	$(BIN)/python docs/build_site.py

docs/tour.ipynb: docs/tour.py | $(VENV)/.tested
	$(BIN)/jupytext --quiet --update --to ipynb --output $@ $<

# One file for all extras, so that their pins agree; each line says what asks for it. OPTIONS=--upgrade renews the pins.
# torch and torchvision, and what they alone ask for, are left to pip: their builds differ by machine.
LEFT_OUT := torch torchvision setuptools
constraints: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	printf '%s; sys_platform == "none"\n' torch torchvision > $(VENV)/left-out.txt
	$(BIN)/uv pip compile --quiet --universal --all-extras --override $(VENV)/left-out.txt \
	    $(LEFT_OUT:%=--no-emit-package %) --annotation-style line --custom-compile-command "make constraints" \
	    --output-file launch/constraints.txt $(OPTIONS) pyproject.toml
	sed -i.old "/sys_platform == 'none'/d" launch/constraints.txt && rm launch/constraints.txt.old

dist: $(VENV)/.tested
	rm -rf dist
	$(BIN)/python -m build

# Of an environment that holds the wheel and what it asks for, and nothing else.
sbom: dist
	$(BIN)/python -m venv --clear $(VENV)-sbom
	$(VENV)-sbom/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt dist/*.whl
	$(PIP_INSTALL) cyclonedx-bom pip-licenses
	mkdir -p build/sbom
	$(BIN)/cyclonedx-py environment --output-reproducible --output-file build/sbom/naign.cdx.json $(VENV)-sbom
	$(BIN)/pip-licenses --python $(VENV)-sbom/bin/python --format markdown --with-urls --output-file build/sbom/licenses.md

# Of a release: NAME.tar for each recipe, a folder with float16 weights and their evaluation, and SHA256SUMS. Its numbers
# are measured with these weights. A finished run in runs/NAME is not trained again; delete build/ to export and measure anew.
MODELS ?= mnist fashion_mnist cifar10_cpu
models: $(MODELS:%=configs/%.yaml) $(MODELS:%=build/models/%.tar)
	$(if $(strip $(MODELS)),,$(error MODELS is empty: name recipes of configs/, as MODELS=mnist))
	cd build/models && sha256sum *.tar > SHA256SUMS

build/models/%.tar: | $(VENV)/.installed
	$(BIN)/accelerate launch --quiet pipeline/train.py --config configs/$*.yaml --run.path runs/$*
	rm -rf build/models/$*
	$(BIN)/naign export runs/$* --to build/models/$* --dtype float16
	$(BIN)/naign evaluate build/models/$*
	tar -C build/models -cf $@.partial $*
	mv $@.partial $@

image:
	@command -v docker > /dev/null || { echo "make image needs docker, and there is none on PATH: install it"; exit 1; }
	docker build -f launch/Dockerfile --target $(TARGET) --build-arg VERSION=$(VERSION) \
	    --build-arg TORCH_INDEX=$(TORCH_INDEX) -t naign:$(TARGET) .

golden: $(VENV)/.tested
	$(BIN)/python -m tests.golden

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-sbom build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
