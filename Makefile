# Two commands are all a newcomer needs: `make demo` and `make test`. Both set everything up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CORE := $(VENV)/.core
DEMO := build/demo

# Threads that wait by spinning take the core from those that work, on small machines most of all.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo test lint proto bench gpu-check clean

help:
	@echo "make demo       replay a generated trace: hit ratios, speedup, agreement with full recompute"
	@echo "make test       set up and run the tests"
	@echo "make lint       ruff, mypy, and whether the generated protobuf stubs are current"
	@echo "make bench      CPU benchmarks into benchmarks/results/"
	@echo "make gpu-check  GPU tests and GPU replays on a CUDA machine (uses PYTHON's own packages)"

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=68,<90" wheel "nanobind>=2.4,<4"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[trace,report,server,dev]"
	touch $@

$(CORE): $(READY) setup.py $(wildcard csrc/*/* csrc/*/*/*)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

setup: $(CORE)

demo: setup
	mkdir -p $(DEMO)
	$(BIN)/mtserve trace generate --users 24 --requests 300 --seed 7 --out $(DEMO)/trace.jsonl.gz
	$(BIN)/mtserve replay $(DEMO)/trace.jsonl.gz --model mtgr-small --device cpu \
		--gpu-cache 25%ws --host-cache 100%ws --json $(DEMO)/replay.json --report $(DEMO)

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/generate_proto.py --check

proto: setup
	$(BIN)/python scripts/generate_proto.py

bench: setup
	$(BIN)/python benchmarks/bench_planning.py
	$(BIN)/python benchmarks/bench_history.py
	$(BIN)/python benchmarks/bench_replay.py

# Runs on a machine with CUDA, with the interpreter that has torch for it.
gpu-check:
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

clean:
	rm -rf build $(VENV) mtserve/_core*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
