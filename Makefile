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

# Nine minutes in all, with a build of at most 90 seconds (the rest runs without it, too) and a limit for each part. One
# that is cut prints what it has timed, puts it into results/<device>/part/ and leaves the old result file; the parts
# after it still run. Where xdist is there, tests run side by side, and so does a first pass over what is timed: Triton
# compiles a kernel when it is first called. Of ops and layers those cases that say most, into part/ too; all of them,
# without --only, take half an hour.
OPS := not float32 and not torch.compile and (nllb-600m or test_lora_linear)
LAYERS := nllb-600m and LoRA and not torch.compile
gpu:
	@failed=0; \
	build() { timeout -k 5 $$1 $(GPU_PYTHON) setup.py --quiet build_ext --inplace; }; \
	build 120 || { failed=1; echo "make gpu: the build failed; C++ alone"; PETL_CUDA=0 build 90; }; \
	part() { \
	    limit=$$1; shift; echo "make gpu: at most $$limit s: $$*"; \
	    PYTHONPATH=.:python$${PYTHONPATH:+:$$PYTHONPATH} timeout --foreground -s INT -k 15 $$limit $(GPU_PYTHON) -m "$$@"; code=$$?; \
	    case $$code in 0) ;; 124|137) echo "make gpu: cut after $$limit s: $$*"; failed=1;; *) failed=1;; esac; \
	}; \
	workers=$$($(GPU_PYTHON) -c "import os, xdist; print(min(12, os.cpu_count()))" 2>/dev/null); \
	part 130 pytest -q -m "gpu and not slow" $${workers:+-n $$workers} tests; \
	if [ -n "$$workers" ]; then \
	    part 60 pytest -q --disable-warnings --benchmark-disable -o "python_files=bench_*.py" --device cuda -n $$workers \
	        -k "ours and (($(OPS)) or ($(LAYERS)))" bench/ops bench/layers; \
	fi; \
	part 100 petl_mt.cli bench ops --peers --device cuda --only "$(OPS)"; \
	part 40 petl_mt.cli bench layers --peers --device cuda --only "$(LAYERS)"; \
	part 120 petl_mt.cli bench step --peers --device cuda; \
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
