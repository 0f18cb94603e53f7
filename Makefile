# make train  set-up and the main job: the MLP GAN on MNIST      make train ARGS="--steps 50" passes flags
# make test   set-up and all tests                                make test ARGS="-k philox"
# make test-long   the tests that take long: 50 kills of a run, one at each file operation; 2 000 random calls of each op
# make sanitize    the C++ ops under AddressSanitizer and UBSan
# make build | lint | bench | reproduce | gpu | clean
SHELL := /bin/bash
PYTHON ?= python3
# The tested default. Another build: make train TORCH="torch==2.12.1 --index-url ..."
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
ARGS ?=
PRESET ?= gan

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h)

.PHONY: train test test-long sanitize build lint format bench reproduce gpu clean
.DEFAULT_GOAL := build

# One stamp for each step, so that a second make does nothing; a change of TORCH, TRITON or PYTHON makes the first one anew.
STAMPS := .stamps
ENV := $(STAMPS)/env
SETTINGS := $(PYTHON) | $(TORCH) | $(TRITON)
ifneq ($(strip $(SETTINGS)),$(strip $(shell cat $(STAMPS)/settings 2>/dev/null)))
.PHONY: $(ENV)
endif

$(ENV): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found: install Python 3.10 or newer (Debian: apt-get install python3 python3-venv python3-dev), or pass PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is $$($(PYTHON) --version), gankern needs Python 3.10 or newer: pass PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH)
	$(PIP) install -q numpy $(TRITON) "setuptools>=77" wheel pybind11 ninja "pillow>=10.1" rich "tyro>=1.0" safetensors tensorboard matplotlib
	@mkdir -p $(STAMPS) && echo '$(SETTINGS)' >$(STAMPS)/settings && touch $@

$(STAMPS)/dev: $(ENV)
	$(PIP) install -q pytest pytest-benchmark pytest-timeout pytest-xdist hypothesis ruff==0.17.6 mypy==2.4.1 "lightning>=2.6,<3" playwright scipy "torchmetrics>=1.9" onnx onnxruntime onnxscript wandb
	@touch $@

$(STAMPS)/build: $(ENV) setup.py $(CSRC)
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || echo "make: no C++ compiler was found; going on with plain PyTorch and Triton (Debian: apt-get install g++ python3-dev)" >&2
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

build: $(STAMPS)/build

train: build
	$(BIN)/gankern-train $(PRESET) $(ARGS)

test: build $(STAMPS)/dev
	GANKERN_REQUIRE=$$(command -v $${CXX:-c++} >/dev/null && echo compiled,)triton TRITON_INTERPRET=1 \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: override ARGS := -m long $(ARGS)
test-long: test

# A package of its own with instrumented C++, and random calls of every op on it, good and bad.
SANITIZERS := -fsanitize=address,undefined
SANITIZED := build/sanitized
sanitize: $(STAMPS)/dev
	GANKERN_BUILD=require LDFLAGS="$(SANITIZERS)" GANKERN_CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all $(SANITIZERS)" \
	$(BIN)/python setup.py -q build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/tmp
	LD_PRELOAD="$$(for name in asan ubsan stdc++; do $${CXX:-g++} -print-file-name=lib$$name.so; done | xargs)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 GANKERN_SANITIZED=1 GANKERN_REQUIRE=compiled PYTHONPATH=$(SANITIZED)/lib \
	$(BIN)/pytest --import-mode=append -o pythonpath=$(SANITIZED)/lib -q --capture=no tests/test_ops_properties.py tests/test_ops_processes.py -k "not triton and not 32_bits" $(ARGS)

lint: build $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: build $(STAMPS)/dev
	$(BIN)/python -m pytest bench $(ARGS)

# The tables for a CPU; `gankern reproduce` lists them all.
reproduce: build
	$(BIN)/gankern reproduce fgan pacgan1-ring packing-ring unrolled-ring wgan-gp-toys --out docs/reproduce $(ARGS)

# Installs nothing: the python3 there must have torch >= 2.11 with CUDA, triton and pytest.
gpu:
	bash bench/gpu.sh

clean:
	rm -rf build dist *.egg-info .stamps gankern/*.so .pytest_cache .ruff_cache .mypy_cache
