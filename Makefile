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

.PHONY: demo test test-newest test-oldest test-oldest-quick bench gpu lint memory-table clean

demo: $(VENV)/.package
	$(BIN)/petl-mt demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The parts of the suite that touch other libraries, with the newest and the oldest versions of those that pyproject.toml
# allows, each in an environment of its own, on a copy of the sources with its own build of the extension. TORCH=2.13.0
# takes that PyTorch in the place of the range's end: some indexes have a small build of it, without CUDA.
TORCH ?=
LIBRARY_TESTS := tests/test_versions.py tests/test_transformers_names.py tests/interop tests/methods \
    tests/layers/test_lean_exact.py tests/layers/test_lean_model.py tests/layers/test_no_waiting.py \
    tests/memory/test_generation.py tests/memory/test_lean_auto.py tests/backends/test_triton_interpreter.py \
    tests/petl_mt/test_evaluate.py tests/petl_mt/test_families.py tests/petl_mt/test_new_model.py \
    tests/petl_mt/test_optimizer.py tests/petl_mt/test_train.py tests/petl_mt/test_translate_memory.py
QUICK_TESTS := tests/test_versions.py tests/test_transformers_names.py tests/interop/test_hf.py \
    tests/interop/test_peft_format.py tests/methods/test_prefix.py tests/petl_mt/test_translate_memory.py
COPIED := setup.py pyproject.toml constraints.txt README.md MANIFEST.in csrc petl_kernels python tests bench
RANGES := import sys; from petl_kernels import versions; print(versions.constraints(sys.argv[1], sys.argv[2:]))

test-newest test-oldest: test-%: $(VENV)-%/.made
	$(call copy,$(VENV)-$*)
	cd $(VENV)-$*/src && OMP_NUM_THREADS=1 ../bin/python -m pytest -q -n 2 $(LIBRARY_TESTS)

$(VENV)-%/.made: pyproject.toml $(SOURCES)
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -c "$(RANGES)" $* $(if $(TORCH),torch) > $(VENV)-$*/constraints.txt
	$(if $(TORCH),echo torch==$(TORCH) >> $(VENV)-$*/constraints.txt)
	$(VENV)-$*/bin/pip install $(LATEST) -c $(VENV)-$*/constraints.txt torch numpy setuptools wheel ninja pybind11
	$(call copy,$(VENV)-$*)
	cd $(VENV)-$*/src && ../bin/pip install $(LATEST) -c ../constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

LATEST := --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager
# Without extensions, which belong to the PyTorch of the environment that they were built in.
copy = mkdir -p $(1)/src && tar -c --exclude='*.so' --exclude=__pycache__ $(COPIED) | tar -x -C $(1)/src

# The same in a minute or two: the environment of the pins, extension and PyTorch included, with the oldest of the other
# libraries over it. The oldest, since what is pinned is the newest.
test-oldest-quick: $(VENV)-quick/.made
	PYTHONPATH=.:python OMP_NUM_THREADS=1 $(VENV)-quick/bin/python -m pytest -q -n 2 $(QUICK_TESTS)

$(VENV)-quick/.made: $(VENV)/.dev pyproject.toml
	$(BIN)/python -m venv --clear $(VENV)-quick
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > $$(echo $(VENV)-quick/lib/python*/site-packages)/pins.pth
	$(VENV)-quick/bin/python -c "$(RANGES)" oldest torch triton > $(VENV)-quick/constraints.txt
	$(VENV)-quick/bin/pip install --quiet --disable-pip-version-check -c $(VENV)-quick/constraints.txt \
	    numpy transformers accelerate peft bitsandbytes sacrebleu
	touch $@

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
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest $(VENV)-quick build petl_kernels/*.so *.egg-info

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
