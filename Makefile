# Every target sets itself up on a machine with python3 (3.10 or newer) and g++; a second run finds its stamps and is quick.
PYTHON ?= python3
# The machine with the GPU brings its own PyTorch, so `make gpu` builds and runs with that one.
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# Folders of benchmarks that are there.
BENCHES := $(foreach what,ops layers step,$(if $(wildcard bench/$(what)/bench_*.py),$(what)))
SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test bench gpu gpu-more lint memory-table clean

demo: $(VENV)/.package
	$(BIN)/petl-mt demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench: $(VENV)/.dev
	$(BIN)/petl-mt bench $(BENCHES) --peers

memory-table: $(VENV)/.dev
	$(BIN)/python bench/kept_bytes.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What a card says in six minutes: bench/gpu.py has the parts and their limits. TEXT="a.en a.sw" LANGUAGES=en-sw trains on
# your text, PARTS="product step" runs some of the parts, gpu-more those that take longer.
gpu gpu-more:
	$(GPU_PYTHON) bench/gpu.py $(PARTS) $(if $(filter gpu-more,$@),--more) $(if $(TEXT),--text $(TEXT)) \
	    $(if $(LANGUAGES),--languages $(LANGUAGES))

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
