# The tests are run with this version. On Linux the package index sends its CUDA build (gigabytes, and it runs on a CPU
# too); for the CPU build point pip at PyTorch's CPU index, as pytorch.org says: make install TORCH="torch==2.13.0 ..."
TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: install sample test lint bench FORCE

install: .venv/installed

.venv/installed: setup.py pyproject.toml $(wildcard csrc/* csrc/*/* csrc/*/lib/*) .venv/torch
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python >= 3.10 is needed, $(PYTHON) is %d.%d" % v[:2] or 0)'
	@echo "Installing $(TORCH) and this package into .venv (minutes, the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install "setuptools>=77" wheel ninja
	@$(PIP) install $(TORCH)
	@$(PIP) install --no-build-isolation -e ".[dev]"
	@$(BIN)/python -c 'import torch; print("Installed: torch", torch.__version__)'
	@touch $@

# Touched only when TORCH changes, so that choosing another torch reinstalls everything.
.venv/torch: FORCE
	@mkdir -p .venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

sample: install
	$(BIN)/python -m lumina demo --out samples/grid.png

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.h csrc/*/*.* csrc/*/lib/*.* tests/cuda_host/*.h tests/cuda_host/*.c*)

bench: install
	$(BIN)/python -m benchmarks.report --quick --out report
