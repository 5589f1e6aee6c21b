# Everything runs in .venv, which the first call makes (a few minutes). Needs Python 3.11 or newer.
PYTHON ?= python3
REPO := org/qwen3-moe-fused
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
TRITON := triton==3.6.0; platform_system == "Linux"
# A test process for each core, up to eight, of one thread each: of more threads a test of small sizes gains little.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help test demo build lint publish clean

help:
	@echo "make demo     fine-tune a small Qwen3-MoE by LoRA and convert the adapter; ARGS=... goes to examples/demo.py"
	@echo "make test     build the kernel, lint, run every test"
	@echo "make build    build the kernel into build/ and load it"
	@echo "make lint     ruff check and ruff format --check"
	@echo "make publish  build from a clean commit and put it on the Hub; ARGS='--dry-run FOLDER' only lays it out"
	@echo "make clean    remove what the others made"

# The builder itself needs the newer kernels library; what it builds does not.
test: build lint .compat/ready .publish/ready
	@echo "== Tests: transformers and kernels of requirements.txt"
	@$(PYTEST) $(ARGS)
	@echo "== Tests: transformers and kernels of requirements-compat.txt, with the same build"
	@PYTHONPATH="$(CURDIR)/.compat" $(PYTEST) -m compat --kernel-dir . --ignore tests/test_build.py \
	    --ignore tests/hub/test_publish.py $(ARGS)

demo: build
	@LOCAL_KERNELS="$(REPO)=$(CURDIR)" $(BIN)/python examples/demo.py $(ARGS)

build: .venv/ready
	@echo "== Building the kernel"
	@$(BIN)/python scripts/build_kernel.py

publish: .publish/ready
	@PYTHONPATH="$(CURDIR)/.publish" $(BIN)/python scripts/publish_kernel.py $(ARGS)

lint: .venv/ready
	@echo "== Linting"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet

# PyTorch first: resolved among the others, it would arrive with CUDA even where a CPU build is at hand.
.venv/ready: requirements.txt integration/pyproject.toml
	@echo "== Setting up .venv, once: PyTorch ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) install "$$(grep ^torch== requirements.txt)"
	@$(BIN)/python -c "import torch; raise SystemExit(torch.version.cuda is None)" || $(PIP) install '$(TRITON)'
	@echo "== Setting up .venv, once: requirements.txt and the integration ..."
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps --editable integration
	@touch $@

# A folder beside .venv, for a few packages in other versions: it goes before .venv on PYTHONPATH.
.%/ready: requirements-%.txt .venv/ready
	@echo "== Setting up .$*, once: $< ..."
	@rm -rf .$*
	@$(PIP) install --target .$* --no-deps -r $<
	@touch $@

clean:
	@rm -rf .venv .compat .publish build outputs
