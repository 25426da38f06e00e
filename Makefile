# The tests are run with this version. On Linux the package index sends its CUDA build (gigabytes, and it runs on a CPU
# too); for the CPU build point pip at PyTorch's CPU index, as pytorch.org says: make install TORCH="torch==2.13.0 ..."
TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := .venv/bin
# Torch's thousands of files are compiled when they are imported; most never are.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off --no-compile

# The CUDA kernels are checked for every architecture, also where torch has no CUDA and could not load them.
TORCH_CUDA_ARCH_LIST ?= $(shell sed -n 's/^ARCHS = "\(.*\)"/\1/p' setup.py)
export PYTHONUNBUFFERED = 1

# Before a long command: says every so many seconds that it is still at work.
EVERY ?= 10
AWAKE = n=0; while sleep $(EVERY) >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do \
	n=$$((n + $(EVERY))); echo "[$$n s]"; done & trap "kill $$! 2>/dev/null" EXIT; set -e;

.PHONY: install sample example-pipeline test lint bench FORCE

install: .venv/all

# What drawing needs: torch, this package, and its C++ kernels.
.venv/drawing: setup.py build_backend.py pyproject.toml $(wildcard csrc/*.h csrc/cpu/* csrc/cpu/lib/*) .venv/torch
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python >= 3.10 is needed, $(PYTHON) is %d.%d" % v[:2] or 0)'
	@echo "Installing $(TORCH) and this package into .venv (two minutes, the first time)"
	@$(AWAKE) export LUMINA_KERNELS_SKIP_CUDA_BUILD=1; \
	$(PYTHON) -m venv .venv; \
	$(PIP) "setuptools>=77" wheel ninja; \
	$(PIP) $(TORCH); \
	$(BIN)/python setup.py -q build_ext --inplace; \
	$(PIP) --no-build-isolation -e .
	@$(BIN)/python -c 'import torch; print("Installed: torch", torch.__version__)'
	@touch $@

# And everything else: extras, tools, and the CUDA kernels where there is an nvcc.
.venv/all: .venv/drawing $(wildcard csrc/cuda/* csrc/cuda/lib/*)
	@echo "Installing what the tests need, and the CUDA kernels if there is an nvcc (minutes, the first time)"
	@$(AWAKE) export TORCH_CUDA_ARCH_LIST="$(TORCH_CUDA_ARCH_LIST)"; \
	$(BIN)/python setup.py -q build_ext --inplace; \
	$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

# Touched only when TORCH changes, so that choosing another torch reinstalls everything.
.venv/torch: FORCE
	@mkdir -p .venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

sample: .venv/drawing
	@$(AWAKE) $(BIN)/python -m lumina demo --out samples/grid.png

# What the pipelines of the released models need on top of that.
.venv/pipelines: .venv/drawing
	@echo "Installing diffusers, transformers and accelerate into .venv"
	@$(AWAKE) export LUMINA_KERNELS_SKIP_CUDA_BUILD=1; $(PIP) --no-build-isolation -e ".[diffusers]"
	@touch $@

# The weights are random and the pictures noise; the way from the prompt to the file is the real one.
TINY := samples/tiny
DRAW = $(BIN)/python -m lumina sample "a red apple"
NEXT = $(DRAW) --checkpoint $(TINY)/lumina_next
example-pipeline: .venv/pipelines
	@rm -rf $(TINY)
	@$(AWAKE) (set -x; for family in lumina_next lumina2 z_image; do \
	$(BIN)/python examples/tiny_checkpoint.py $$family $(TINY)/$$family; \
	$(DRAW) --checkpoint $(TINY)/$$family --size 64x64 --out $(TINY)/$$family.png; done; \
	$(NEXT) --region 0,0,0.5,1 "a cat" --region 0.5,0,1,1 "the sea" --out $(TINY)/regions.png; \
	$(NEXT) --size 192x64 --tiled --rope ntk --stages --verbose --out $(TINY)/panorama.png; \
	$(DRAW) --out $(TINY)/apple.png; \
	$(BIN)/python -c "import PIL.Image as P; P.linear_gradient('L').rotate(90).save('$(TINY)/mask.png')"; \
	$(NEXT) --size 128x128 --image $(TINY)/apple.png --strength 0.1 --out $(TINY)/img2img.png; \
	$(NEXT) --size 128x128 --image $(TINY)/apple.png --mask $(TINY)/mask.png --out $(TINY)/inpainting.png)
	@$(AWAKE) $(BIN)/python examples/text_to_image.py

test: .venv/all
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: .venv/all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.h csrc/*/*.* csrc/*/lib/*.* tests/cuda_host/*.h tests/cuda_host/*.c*)

bench: .venv/all
	$(BIN)/python -m benchmarks.report --quick --out report
