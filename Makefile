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

.PHONY: demo test bench gpu lint memory-table clean

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

# Nine minutes in all: 90 seconds for the build, and a limit for each part. One that is cut prints what it has timed,
# puts it into results/<device>/part/ and leaves the old result file; the parts after it still run.
gpu:
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	@failed=0; \
	part() { \
	    limit=$$1; shift; echo "make gpu: at most $$limit s: $$*"; \
	    PYTHONPATH=.:python timeout --foreground -s INT -k 5 $$limit $(GPU_PYTHON) -m "$$@"; code=$$?; \
	    case $$code in 0) ;; 124|137) echo "make gpu: cut after $$limit s: $$*"; failed=1;; *) failed=1;; esac; \
	}; \
	part 140 pytest -m gpu tests; \
	for what in $(BENCHES); do \
	    case "$$what" in ops) limit=140;; step) limit=125;; *) limit=45;; esac; \
	    part $$limit petl_mt.cli bench $$what --peers --device cuda; \
	done; \
	exit $$failed

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
