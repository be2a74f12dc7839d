# Every target sets up .venv by itself. `make demo ARGS="--json out.json"` passes ARGS on.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TORCH := $(shell grep -i '^torch==' constraints.txt)

.PHONY: help demo test check secrets audit proto bench docs clean
help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# torch goes first and by itself: with it in place nothing asks the index for another build of it.
$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## eight users tune at the same time, then generate in one mixed batch
	$(BIN)/lopa demo $(ARGS)

test: $(VENV)/.dev  ## every test that needs no patience (all of them: make test ARGS="-m ''")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.dev  ## format, lint, types, generated code and tables, licences
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/generate_proto.py --check
	$(BIN)/python scripts/generate_error_table.py --check
	$(BIN)/python scripts/update_tables.py --check
	$(BIN)/python scripts/sbom.py

secrets: $(VENV)/.dev  ## keys and passwords in the tree (ten seconds)
	$(BIN)/python scripts/check_secrets.py

audit: $(VENV)/.dev secrets  ## secrets, licences, bill of materials (.venv/sbom.json), known weaknesses of dependencies: asks the network
	$(BIN)/python scripts/sbom.py --out $(VENV)/sbom.json
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install -q pip-audit
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

proto: $(VENV)/.dev  ## regenerate sdk/lopa/v1 from proto/
	$(BIN)/python scripts/generate_proto.py

docs: $(VENV)/.dev  ## the API reference, in docs/api
	$(BIN)/python scripts/build_api_reference.py

bench: $(VENV)/.dev  ## list the benchmarks
	@$(BIN)/python benchmarks/list.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist
