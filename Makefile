# `make setup` once; everything else calls it first. Every target works on a machine that reaches only a package index.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test check bench docs clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/softprompt fetch smollm2-135m
	$(BIN)/softprompt fetch rotten-tomatoes
	$(BIN)/softprompt train --backbone smollm2-135m --task sentiment --zero-shot --show 3 \
	    --steps 300 --batch-size 16 --test-rows 1000 --eval-steps 300 --dev-rows 250 dpt --rank 10 --length 20
	@echo
	@echo 'Next:'
	@echo '  .venv/bin/softprompt list runs'
	@echo '  .venv/bin/softprompt evaluate runs/sentiment-dpt-0'
	@echo '  .venv/bin/softprompt predict runs/sentiment-dpt-0 --input examples/reviews.csv'
	@echo '  .venv/bin/softprompt train --task examples/support/support.toml dpt --rank 5 --length 20'

test: setup
	$(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make.py --check

bench: setup
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/llama_step.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/score.py
	$(BIN)/python benchmarks/passages.py
	$(BIN)/python benchmarks/multi_prompt.py
	$(BIN)/python benchmarks/concurrent_runs.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/t5_step.py
	$(BIN)/python benchmarks/whole_run.py

docs: setup
	$(BIN)/python docs/make.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
