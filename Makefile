# make demo   the whole way on a laptop: corpus -> tokenizer -> shards -> LLM -> Hugging Face folder -> report
# make test   all tests
# make clean  remove the demo's run folder

PYTHON   ?= python3
VENV     ?= .venv
BIN      := $(VENV)/bin
# torch goes first: what depends on it would otherwise bring the newest build, with CUDA.
TORCH    ?= torch==2.13.0
PARALLEL ?= pipeline=2
# DeepSpeed's kernels are built when they are first used, not at installation.
export DS_BUILD_OPS := 0

.PHONY: install demo test test-mcore clean
install: $(VENV)/.installed
demo: install
	$(BIN)/python -m megadual.demo --parallel "$(PARALLEL)"
test: install
	$(BIN)/python -m pytest tests

$(VENV)/.installed: setup.py requirements-nodeps.txt
	@echo "== setting up $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	touch $@

# The distributed tests against the newest megatron-core, whatever this Python's pip resolves to.
MCORE ?= 0.19.2
test-mcore: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
		--upgrade --target $(VENV)/megatron-core-$(MCORE) megatron-core==$(MCORE)
	PYTHONPATH=$(VENV)/megatron-core-$(MCORE) $(BIN)/python -m pytest tests/distributed

clean:
	rm -rf runs/demo
