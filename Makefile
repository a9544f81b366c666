# Every target sets itself up on a machine with python3 (3.10 or newer) and g++; a second run finds its stamps and is quick.
PYTHON ?= python3
# The machine with the GPU brings its own PyTorch, so `make gpu` builds and runs with that one.
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: of the thousands of files of torch and transformers few are imported, and Python compiles those then.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Folders of benchmarks that are there.
BENCHES := $(foreach what,ops layers step,$(if $(wildcard bench/$(what)/bench_*.py),$(what)))
SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')

# Images of containers set this. Each process of the tests would then compile the sources of torch and transformers anew,
# for ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test-check test test-slow test-all test-newest test-oldest test-oldest-quick bench gpu gpu-more lint docs \
    memory-table clean

demo: $(VENV)/.package
	$(BIN)/petl-mt demo

# What to run after each change, to be kept under a minute: lint (what needs no run: style, types, the order of the rooms)
# beside one case of each op and one step of each family. It imports every test file, too.
check: $(VENV)/.dev
	$(MAKE) --no-print-directory -j 2 --output-sync lint test-check

test-check: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "check and not repeat"

# The tests but for two kinds: test-slow has those that take more than ten seconds (kernels compiled for every card, the
# emulated card, programs from the command line), test-all these and the repeats: more cases of what other tests show.
# worksteal: each worker begins with one half, so that what a file's tests share is made once.
MARKED_test := -m "not repeat and not slow"
MARKED_test-slow := -m "slow and not repeat"
test test-slow test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(MARKED_$@)

# The parts of the suite that touch other libraries, with the newest and the oldest versions of those that pyproject.toml
# allows, each in an environment of its own, on a copy of the sources with its own build of the extension. TORCH=2.13.0
# takes that PyTorch in the place of the range's end: some indexes have a small build of it, without CUDA.
TORCH ?=
LIBRARY_TESTS := tests/test_versions.py tests/models/test_transformers_names.py tests/interop tests/methods \
    tests/layers/test_lean_exact.py tests/layers/test_lean_model.py tests/layers/test_no_waiting.py \
    tests/planning/test_beam_search.py tests/planning/test_lean_auto.py tests/backends/test_triton_interpreter.py \
    tests/petl_mt/test_evaluate.py tests/petl_mt/test_families.py tests/petl_mt/test_new_model.py \
    tests/petl_mt/test_optimizer.py tests/petl_mt/test_train.py tests/petl_mt/test_translate_memory.py
QUICK_TESTS := tests/test_versions.py tests/models/test_transformers_names.py tests/interop/test_hf.py \
    tests/interop/test_peft_format.py tests/methods/test_prefix.py tests/petl_mt/test_translate_memory.py
COPIED := setup.py pyproject.toml constraints.txt README.md LICENSE MANIFEST.in csrc petl_kernels python tests bench
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

LATEST := --quiet --disable-pip-version-check --no-compile --upgrade --upgrade-strategy eager
# Without extensions, which belong to the PyTorch of the environment that they were built in.
copy = rm -rf $(1)/src/tests $(1)/src/bench && mkdir -p $(1)/src && tar -c --exclude='*.so' --exclude=__pycache__ $(COPIED) | tar -x -C $(1)/src

# The same in a minute or two: the environment of the pins, extension and PyTorch included, with the oldest of the other
# libraries over it. The oldest, since what is pinned is near the newest.
test-oldest-quick: $(VENV)-quick/.made
	PYTHONPATH=.:python OMP_NUM_THREADS=1 $(VENV)-quick/bin/python -m pytest -q -n 2 $(QUICK_TESTS)

$(VENV)-quick/.made: $(VENV)/.dev pyproject.toml
	$(BIN)/python -m venv --clear $(VENV)-quick
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > $$(echo $(VENV)-quick/lib/python*/site-packages)/pins.pth
	$(VENV)-quick/bin/python -c "$(RANGES)" oldest torch triton > $(VENV)-quick/constraints.txt
	$(VENV)-quick/bin/pip install --quiet --disable-pip-version-check --no-compile -c $(VENV)-quick/constraints.txt \
	    numpy transformers accelerate peft bitsandbytes sacrebleu
	touch $@

bench: $(VENV)/.dev
	$(BIN)/petl-mt bench $(BENCHES) --peers

memory-table: $(VENV)/.dev
	$(BIN)/python -m bench.kept_bytes

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

# The pages of docs/ with the API reference, in build/site.
docs: $(VENV)/.dev
	$(PIP) 'petl-kernels[docs]'
	$(BIN)/mkdocs build --strict

# What a card says in six minutes: bench/gpu.py has the parts and their limits. TEXT="a.en a.sw" LANGUAGES=en-sw trains on
# your text, PARTS="product step" runs some of the parts, gpu-more those that take longer.
gpu gpu-more:
	$(GPU_PYTHON) -m bench.gpu $(PARTS) $(if $(filter gpu-more,$@),--more) $(if $(TEXT),--text $(TEXT)) \
	    $(if $(LANGUAGES),--languages $(LANGUAGES))

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

# Not after .package: pip would build the extension a second time.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $(VENV)/.package $@
