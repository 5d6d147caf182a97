# make demo   the whole way on a laptop: corpus -> tokenizer -> shards -> LLM -> Hugging Face folder -> report
# make scenes the same at a size at which it works: on one GPU, from nothing to a model that describes and draws
# make test   the tests
# make check  lint, format and types
# make test-mcore, test-transformers, test-slurm   against other versions; jobs on a real Slurm, started here as root
# make test-latest   a part of the tests with the newest packages that setup.py allows
# make constraints   renew constraints.txt from those
# make test-lmms-eval   an exported folder in the real lmms-eval
# make test-gpu   what needs a GPU
# make golden  renew the numbers of the golden runs, for a change that is meant to change them
# make clean  remove the demo's run folder

PYTHON   ?= python3
VENV     ?= .venv
BIN      := $(VENV)/bin
# torch goes first: what depends on it would otherwise bring the newest build, with CUDA.
TORCH    ?= torch==2.13.0
# The versions that the tests have passed with, so that a release of anything changes nothing here.
CONSTRAINTS ?= constraints.txt
PARALLEL ?= data=2
# DeepSpeed's kernels are built when they are first used, not at installation.
export DS_BUILD_OPS := 0

.PHONY: install demo scenes test check test-gpu test-mcore test-transformers test-lmms-eval test-latest constraints test-slurm \
	golden clean
install: $(VENV)/.installed
demo: install
	$(BIN)/python -m megadual.demo --parallel "$(PARALLEL)"
# In pieces: SCENES="--stop-after 540" make scenes, as often as it takes.
scenes: install
	$(BIN)/python -m megadual.demo.scenes $(SCENES)
# Two at a time, a file's in one process: most tests use one core, and share what their file has made. In the order of
# their names, which has the folders with long tests first: what is left for the end is short.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
test: install
	$(BIN)/python -m pytest tests --ignore=tests/slurm $(TWO)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
test-gpu: install
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: make test-gpu needs a GPU, and torch sees none here")'
	$(BIN)/python -m pytest --noconftest tests/gpu

# Few of the many files are used: they are compiled when they are first imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
$(VENV)/.installed: setup.py requirements-nodeps.txt $(CONSTRAINTS)
	@echo "== setting up $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(CONSTRAINTS:%=-c %) $(TORCH)
	$(PIP) $(CONSTRAINTS:%=-c %) -e ".[test]"
	$(PIP) --no-deps -r requirements-nodeps.txt
	touch $@

# The newest of everything but torch, in an environment of its own. What fails here fails for whoever installs without
# constraints.txt: mend it, or bound it in setup.py.
LATEST := $(VENV)-latest
test-latest:
	rm -rf $(LATEST)
	$(MAKE) install VENV=$(LATEST) CONSTRAINTS=
	$(LATEST)/bin/python -m pip freeze | diff --side-by-side --suppress-common-lines --width=100 constraints.txt - || true
	$(LATEST)/bin/python -m pytest tests/unit tests/integration/test_pretrain.py::test_trains_and_resumes \
		tests/integration/test_pipeline.py::test_streaming_dataset_reads_the_documents \
		"tests/distributed/test_layouts.py::test_layout_equals_one_process[DeepSpeed ZeRO-2 DP2]" \
		--deselect tests/unit/test_installation.py::test_constraints_leave_nothing_out

# By the oldest Python: a newer one's packages may not be there for it. Then `make test` and the other versions' targets.
UNBOUND := torch setuptools sympy networkx mpmath $(shell sed -n 's/^\([a-z].*\)==.*/\1/p' requirements-nodeps.txt)
constraints: test-latest
	(grep '^#' constraints.txt; $(LATEST)/bin/python -m pip freeze --exclude-editable $(UNBOUND:%=--exclude %) | \
		sed 's/^megatron-core.*/&; python_version < "3.12"\nmegatron-core==$(MCORE); python_version >= "3.12"/') \
		> $(LATEST)/constraints.txt
	mv $(LATEST)/constraints.txt .

# What depends on megatron-core, against the newest, whatever this Python's pip resolves to: that each layout trains and
# holds out as one process does, and that checkpoints are gone on from. What faults do to files, say, does not.
MCORE ?= 0.19.2
ON_MCORE := equals_one_process or tied or bf16 or resume_ or start_from_weights or stages_follow or one_part or alone
test-mcore: install
	$(PIP) --no-deps --ignore-requires-python \
		--upgrade --target $(VENV)/megatron-core-$(MCORE) megatron-core==$(MCORE)
	PYTHONPATH=$(VENV)/megatron-core-$(MCORE) $(BIN)/python -m pytest tests/distributed $(TWO) -k "$(ON_MCORE)"

# Exported folders under transformers 4, in an environment that borrows the rest (torch) from this one.
TRANSFORMERS ?= 4.57.6
OLD          := $(VENV)/transformers-$(TRANSFORMERS)
PURELIB      := import sysconfig; print(sysconfig.get_path("purelib"))
test-transformers: install
	$(BIN)/python -m venv --without-pip $(OLD)
	$(BIN)/python -m pip --python $(OLD)/bin/python install --quiet --disable-pip-version-check --no-deps \
		transformers==$(TRANSFORMERS) "huggingface_hub<1" "tokenizers>=0.22,<0.23"
	$(BIN)/python -c '$(PURELIB)' > "$$($(OLD)/bin/python -c '$(PURELIB)')/torch.pth"
	MEGADUAL_EXPORT_PYTHON=$(abspath $(OLD))/bin/python $(BIN)/python -m pytest tests/integration/test_convert.py \
		-k "(checkpoint and TP2xPP2) or without_megadual or try_export"
	PYTHONPATH="$$($(OLD)/bin/python -c '$(PURELIB)')" $(BIN)/python -m pytest tests/unit/test_hf_model.py \
		tests/unit/test_chat_template.py

# lmms-eval on an exported folder, in an environment that borrows what it shares (torch) from this one.
LMMS_EVAL := $(VENV)/lmms-eval
test-lmms-eval: install
	$(BIN)/python -m venv --without-pip $(LMMS_EVAL)
	$(BIN)/python -c '$(PURELIB)' > "$$($(LMMS_EVAL)/bin/python -c '$(PURELIB)')/torch.pth"
	$(BIN)/python -m pip --python $(LMMS_EVAL)/bin/python install --quiet --disable-pip-version-check --no-deps \
		--no-compile -r tests/harnesses/requirements.txt
	$(BIN)/python -m pip --python $(LMMS_EVAL)/bin/python install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation -e harnesses
	MEGADUAL_LMMS_EVAL_PYTHON=$(abspath $(LMMS_EVAL))/bin/python $(BIN)/python -m pytest tests/harnesses

# Installs Debian's Slurm packages where they are missing.
test-slurm: install
	$(BIN)/python -m pytest tests/slurm

golden: install
	$(BIN)/python -m megadual.testing.golden --renew

clean:
	rm -rf runs/demo
