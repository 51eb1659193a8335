# `make run`, `make test`, `make bench`, `make lint`: each sets up .venv by itself, once.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: run test test-all sanitize bench compile-report lint format clean

run: $(STAMP)
	$(PY) -m rada train $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(PY) -m pytest $(ARGS)

# The C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
SANITIZED := build/sanitize/rada_kernels/rada_cpu.so
SANITIZERS = $(shell $${CXX:-c++} -print-file-name=libasan.so) $(shell $${CXX:-c++} -print-file-name=libubsan.so)

sanitize: $(STAMP)
	RADA_CMAKE_ARGS=-DRADA_SANITIZE=ON $(PY) setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize/objects
	RADA_CPU_LIBRARY=$(abspath $(SANITIZED)) LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
		$(PY) -m pytest tests/test_cpu_operators.py tests/test_backends.py -k cpu -m "not slow" $(ARGS)

bench: $(STAMP)
	$(PY) bench/kernels.py $(ARGS)

compile-report: $(STAMP)
	$(PY) bench/compile_report.py $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Installed again when what it is made from changes; the exact versions stand in constraints.txt.
CPP := CMakeLists.txt $(wildcard rada_kernels/csrc/*.* rada_kernels/*/*.h)

$(STAMP): pyproject.toml setup.py constraints.txt $(CPP)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision setuptools cmake
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[demo,plot,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
