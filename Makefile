# Needs make and Python >= 3.11, nothing else; `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo announced test lint import-time conformance cards claims clean transfer
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | awk -F': ' '{printf "make %-12s %s\n", $$1, $$2}'

demo: announced $(INSTALLED) ## pretrain a small ConvLM on Moby-Dick (under 5 minutes on 2 cores), then let it write a paragraph
	$(BIN)/python scripts/pretrain.py --config scripts/configs/demo.yaml
	$(BIN)/python scripts/generate.py --model_name_or_path out/demo --prompt "The whale" \
		--max_new_tokens 160 --temperature 0.7 --top_p 0.9 --seed 1
	@echo "Loss curve: out/demo/loss_curve.png. Checkpoint and tokenizer: out/demo"

announced:
	@test -e $(INSTALLED) || echo "First installs torch, transformers and the rest into $(VENV), once: 2 to 5 minutes."
	@echo "Pretrains a small ConvLM on Moby-Dick in under 5 minutes on 2 cores, then lets it write a paragraph."

test: $(INSTALLED) ## run all tests; ARGS="-k word" chooses some
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(BIN)/ruff ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

import-time: $(INSTALLED) ## what `import ordnung` adds to importing torch and transformers
	@$(BIN)/python -X importtime -c "import torch, transformers, ordnung" 2>&1 | grep -E "cumulative|ordnung"

conformance: $(INSTALLED) ## transformers' own model tests on every family: make conformance CHECKOUT=/path/to/transformers
	@test -n "$(CHECKOUT)" || { echo "Say where transformers' tests are: make conformance CHECKOUT=/path/to/transformers" >&2; exit 1; }
	$(PIP) install --quiet --constraint constraints.txt parameterized
	OMP_NUM_THREADS=1 $(BIN)/python tests/conformance/run.py "$(CHECKOUT)" $(ARGS)

transfer: $(INSTALLED) ## pretrain, fine-tune on five tasks, compare: make transfer TEXT=reviews.parquet [GLUE=folder IMDB=folder]
	@test -n "$(TEXT)" || { echo "Say what to pretrain on: make transfer TEXT=/path/to/text" >&2; exit 1; }
	$(BIN)/python scripts/transfer.py --config scripts/configs/transfer_cpu.yaml --pretrain train_file="$(TEXT)" \
		$(if $(GLUE),--glue_path "$(GLUE)") $(if $(IMDB),--imdb_path "$(IMDB)") $(ARGS)

cards: $(INSTALLED) ## make the tables and figures of README.md and model_cards/ from the results files
	$(BIN)/python scripts/make_cards.py

claims: $(INSTALLED) ## run the experiments again and make the page of claims: make claims ARGS="--only growth --inputs books=..."
	$(BIN)/ordnung claims --config claims $(ARGS)
	$(BIN)/python scripts/make_cards.py $(shell $(BIN)/python -c "import vl_convert" 2>/dev/null && echo --page out/claims.html)

clean: ## remove the virtual environment and caches; results in out/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here: install Python 3.11 or later, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Needs Python 3.11 or later, and $(PYTHON) is `$(PYTHON) --version 2>&1`: make PYTHON=/path/to/a/later/python" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "Could not make a virtual environment with $(PYTHON); Debian and Ubuntu need the package python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV) (once, some minutes)"
	$(PIP) install --progress-bar on --constraint constraints.txt --editable ".[test]"
	@touch $@

$(BIN)/ruff: $(INSTALLED)
	$(PIP) install --quiet --constraint constraints.txt ruff
