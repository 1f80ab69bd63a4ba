# make demo | test | test-all | lint | sanitize    Each makes its own environment in .venv, builds where sources changed, and runs.
# PYTHON=python3.12 picks the interpreter. JAX_DWSCONV_CUDA=OFF builds for the CPU only even where there is an nvcc.

PYTHON ?= python3
TAG := $(shell $(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=...") if sys.version_info < (3, 11) else print("py%d.%d" % sys.version_info[:2])')
ifeq ($(TAG),)
$(error no usable interpreter: PYTHON=$(PYTHON))
endif
VENV := .venv/$(TAG)
RUN := $(VENV)/bin/python
WHEELS := build/wheels/$(TAG)
SOURCES := $(wildcard cpu/* cuda/* jax_dwsconv/*.py) CMakeLists.txt pyproject.toml README.md LICENSE
PIP := $(RUN) -m pip --disable-pip-version-check --quiet

# jax's own GPU plugin, by what the driver can run.
GPU_DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
JAX := $(if $(GPU_DRIVER),$(if $(shell [ $(GPU_DRIVER) -ge 580 ] && echo yes),jax[cuda13],jax[cuda12]))

.PHONY: demo test test-all lint sanitize site-packages clean
.DELETE_ON_ERROR:

demo: $(VENV)/.examples
	$(RUN) examples/classify.py

test: $(VENV)/.test
	$(RUN) -P -m pytest -n 2 $(PYTEST_ARGS)

test-all: $(VENV)/.test
	$(RUN) -P -m pytest -n 2 -m "slow or not slow" $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard cpu/*.h cpu/*.cc cuda/*.h cuda/*.cc cuda/*.cu cuda/*.cuh tests/*.cc)

# The CPU kernels and their threads under the sanitizers.
sanitize: $(VENV)/.python
	$(PIP) install cmake ninja
	for sanitizers in address,undefined thread; do \
	  build=build/sanitize-$${sanitizers%,*}; \
	  PATH="$(abspath $(VENV))/bin:$$PATH" cmake -G Ninja -S . -B $$build -DJAX_DWSCONV_SANITIZE=$$sanitizers && \
	  $(VENV)/bin/ninja -C $$build && $$build/cpu/sanitize || exit 1; \
	done

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install pip==26.0
	touch $@

$(WHEELS)/.built: $(VENV)/.python $(SOURCES)
	@echo "Building jax-dwsconv for $(TAG): this takes a minute or two"
	rm -rf $(WHEELS)
	$(PIP) wheel --no-deps --wheel-dir $(WHEELS) .
	touch $@

$(VENV)/.examples $(VENV)/.test: $(VENV)/.%: $(WHEELS)/.built
	$(PIP) uninstall --yes jax-dwsconv
	$(PIP) install "$$(echo $(WHEELS)/*.whl)[$*]" $(JAX)
	touch $@

# Where the package is installed.
site-packages: $(VENV)/.test
	@$(RUN) -c 'import sysconfig; print(sysconfig.get_path("platlib"))'

clean:
	rm -rf .venv build
