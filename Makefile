PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
# The embedded model is small: a second thread gains nothing, and on busy cores it waits for the first.
CALM := OMP_NUM_THREADS=1
# Bytecode of tests, assertions written out, is kept: to make it anew takes a worker seconds.
TESTS := $(CALM) PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal --durations 20 --durations-min 5
# The oldest versions that are supported, in an environment of their own.
MINIMUM ?= .venv-minimum
SOURCES := pyproject.toml setup.py constraints.txt
# The builder of the site, in an environment of its own: it needs no torch, and tests do not need it.
DOCS ?= .venv-docs
BUILDER := mkdocs mkdocs-material mkdocstrings mkdocstrings-python griffelib

.PHONY: demo gallery bench docs unit test long minimum conformance aot check format clean

demo: $(VENV)/.installed
	$(CALM) $(BIN)/hookctl demo --out out

gallery: $(VENV)/.installed
	$(CALM) $(BIN)/hookctl demo all --seeds 32 --out out
	$(CALM) $(BIN)/hookctl demo all --seeds 32 --model shapes-flow --out out/flow
	$(BIN)/python -m hookctl.demos.gallery --from out --flow out/flow --to demos/gallery

bench: $(VENV)/.installed
	$(BIN)/hookctl bench --out out/bench

# A static site in out/docs/site, which loads nothing from elsewhere.
docs: $(DOCS)/.installed
	$(DOCS)/bin/python docs/site/build.py --to out/docs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict -q -f out/docs/mkdocs.yml
	@echo "out/docs/site/index.html; with its search: $(PYTHON) -m http.server -d out/docs/site"

# What is skipped is counted, and run by a target further down.
unit: $(VENV)/.installed-dev
	$(TESTS) --skip slow --skip long --skip conformance --ignore=tests/kernels --ignore=tests/families --ignore=tests/demos

test: $(VENV)/.installed-dev
	$(TESTS) --skip conformance --skip long

# What takes minutes each: every argument's values, every item of the device bench.
long: $(VENV)/.installed-dev
	$(TESTS) -m long

# What is first to break with old versions: reading models, a demo, the command, hostile files.
minimum: $(MINIMUM)/.installed
	$(CALM) $(MINIMUM)/bin/hookctl inspect shapes >/dev/null
	$(CALM) $(MINIMUM)/bin/hookctl demo --seeds 1 --out out/minimum
	$(CALM) $(MINIMUM)/bin/python -m pytest -q tests/hookctl/cli/test_hostile.py \
		tests/hookctl/cli/test_cli.py tests/hookctl/cli/test_lora.py tests/hookctl/preset \
		tests/shapes/test_pipeline.py -k "not with_offsets"

# Every promise for every family; `python -m tests.families.table` writes it as a table.
conformance: $(VENV)/.installed-dev
	$(TESTS) tests/families

# Every form of every kernel for every chip, those too whose source is the recorded one.
aot: $(VENV)/.installed-dev
	$(BIN)/python -m tests.kernels.aot

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(MINIMUM) $(DOCS) out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(MINIMUM)/.installed: $(SOURCES) constraints-minimum.txt
	$(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --disable-pip-version-check -q \
		-c constraints-minimum.txt -e ".[gpu]" peft pytest
	touch $@

$(DOCS)/.installed: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt $(BUILDER)
	touch $@

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	touch $@ $(VENV)/.installed
