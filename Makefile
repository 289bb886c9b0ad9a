# Every target sets up what it needs: a virtual environment in .venv, installed once per change of
# setup.py or pyproject.toml.
#
#   make quickstart        train, sample, verify, learn and report on the CPU: five minutes
#   make test              ruff and the tests
#   make test-slow         tests that take long
#   make test-peers        parity with other libraries (installs torch, transformers, diffusers)
#   make test-llamacpp     parity with llama.cpp (builds it from source: some minutes)
#   make benchmark         decoding speed against transformers
#   make benchmark-grpo    a step of GRPO against TRL (installs it)
#   make study-learning    ways to learn from samples, side by side: half an hour

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
PYTEST_FLAGS ?= -q -n 2 --dist worksteal

# Read, not imported: their losses are taken out of the source (tests/parity/extracted.py).
PUBLISHED := trl==0.24.0 verl==0.9.1 openrlhf==0.11.2

.PHONY: quickstart test test-slow test-peers test-llamacpp benchmark benchmark-grpo study-learning clean

quickstart test test-slow test-peers test-llamacpp study-learning: export JAX_PLATFORMS ?= cpu

quickstart: $(VENV)/installed
	$(BIN)/python -m ancestral.launch.quickstart --workdir=$(WORKDIR)

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m slow

test: $(VENV)/installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow and not peers and not llamacpp"

test-peers: $(VENV)/installed-peers
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m peers

test-llamacpp: $(VENV)/installed-llamacpp
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m llamacpp

benchmark: $(VENV)/installed-peers
	$(BIN)/python -m ancestral.benchmarks.decode_hf

benchmark-grpo: $(VENV)/installed-trl
	OMP_WAIT_POLICY=passive $(BIN)/python -W ignore -m ancestral.benchmarks.grpo_trl

study-learning: $(VENV)/installed
	$(BIN)/python -m ancestral.benchmarks.learning_study

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/installed-peers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test,peers]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target=$(VENV)/published $(PUBLISHED)
	touch $@

$(VENV)/installed-trl: $(VENV)/installed-peers
	$(BIN)/python -m pip install --quiet --editable '.[test,trl]'
	touch $@

# Only libllama is needed: no multimodal part, nothing tuned to this CPU, and -O1, which compiles in
# minutes.
$(VENV)/installed-llamacpp: $(VENV)/installed
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF -DGGML_OPENMP=OFF -DGGML_NATIVE=OFF \
	  -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_C_FLAGS_RELEASE=-O2" \
	  $(BIN)/python -m pip install --editable '.[test,llamacpp]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
