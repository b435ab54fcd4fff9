# make train   set up everything, pretrain a small ViT on demo images, evaluate it, write runs/demo/report.html
# make test    set up everything, then lint, type checks and all tests
# make bench   main benchmarks       make lint   ruff and mypy
# make build   recompile csrc/       make clean  remove what was built (not .venv, not runs)
#
# Variables: PYTHON (3.10 or later), VENV, CXX, TORCH (requirement), TORCH_INDEX_URL (where to look besides the usual
# index; empty: nowhere else), DALI (extra), JOBS (test processes).

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PY := $(VENV)/bin/python
LIBRARY := kernels/fastdino_kernels/libfastdino_cpu.so
SOURCES := $(wildcard csrc/*)

# With an NVIDIA driver the usual index has the CUDA build of torch: 2.10 is its last one for CUDA 12 drivers and for
# V100 (compute capability 7). Without a driver the CPU build, a tenth of the download, comes from PyTorch's own index.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | head -n 1)
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9]*\).*/\1/p' | head -n 1)
ifeq ($(GPU),)
TORCH ?= torch==2.13.0
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
DALI ?= dali-cu13
else ifneq ($(filter 12,$(CUDA))$(filter 7.%,$(GPU)),)
TORCH ?= torch==2.10.0
DALI ?= dali-cu12
else
TORCH ?= torch==2.13.0
DALI ?= dali-cu13
endif

PIP := $(PY) -m pip --disable-pip-version-check install

.PHONY: help train test bench lint build clean
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

train: $(VENV)/.run $(LIBRARY)
	$(PY) -m fastdino.demo

test: $(VENV)/.dev $(LIBRARY) lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(VENV)/.run $(LIBRARY)
	for name in machine memory step loader multicrop kernels; do $(PY) -m bench.$$name || exit 1; done

build: $(VENV)/.run
	FASTDINO_BUILD=1 $(PY) setup.py --quiet build_csrc

clean:
	rm -rf build dist fastdino.egg-info $(LIBRARY) .pytest_cache .mypy_cache .ruff_cache
	find fastdino kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON): Python 3.10 or later is needed; make PYTHON=... chooses another"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch alone first: the other index serves no other package, and what follows must not replace this build.
$(VENV)/.torch: | $(PY)
	$(PIP) --no-deps --retries 1 --timeout 30 $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	@touch $@

$(VENV)/.run: setup.py pyproject.toml | $(VENV)/.torch
	$(PIP) --quiet -e ".[$(DALI)]"
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	FASTDINO_BUILD=0 $(PIP) --quiet -e ".[$(DALI),dev]"
	@touch $@

# Without a compiler the kernels have a slower fallback, so a failure here is told and ignored; make build insists.
$(LIBRARY): $(SOURCES) | $(VENV)/.run
	-@$(PY) setup.py --quiet build_csrc
