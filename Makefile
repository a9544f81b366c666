# Every target sets itself up on a machine with python3 (3.10 or newer) and g++; a second run finds its stamps and is quick.
PYTHON ?= python3
# The machine with the GPU brings its own PyTorch, so `make gpu` builds and runs with that one.
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test bench gpu lint memory-table clean

demo: $(VENV)/.package
	$(BIN)/petl-mt demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench: $(VENV)/.dev
	$(BIN)/petl-mt bench ops --peers
	$(BIN)/petl-mt bench step --peers

memory-table: $(VENV)/.dev
	$(BIN)/python bench/kept_bytes.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu:
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	PYTHONPATH=.:python $(GPU_PYTHON) -m pytest -m gpu tests
	PYTHONPATH=.:python $(GPU_PYTHON) -m petl_mt.cli bench ops --peers --device cuda

clean:
	rm -rf $(VENV) build petl_kernels/*.so *.egg-info

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) torch numpy ninja pybind11
	touch $@

# --no-build-isolation: the extension must be built against the PyTorch that will load it.
$(VENV)/.package: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(PIP) --no-build-isolation -e '.[mt]'
	touch $@

$(VENV)/.dev: $(VENV)/.package
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@
