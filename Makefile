# `make run`, `make test`, `make bench`, `make lint`: each sets up .venv by itself, once.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CPP := $(wildcard rada_kernels/csrc/*.cpp rada_kernels/*/*.h tests/kernels/loops/*.cpp tests/kernels/loops/*.h)

.PHONY: run test test-all wheel loops cross-aarch64 sanitize bench compile-report gpu gpu-long lint format clean

run: $(STAMP)
	$(PY) -m rada train $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(PY) -m pytest $(ARGS)

# dist/: the source distribution and, built from it, the wheel. auditwheel gives the wheel the tag of the oldest glibc
# that it runs on; it refuses a wheel without a library.
wheel: $(STAMP)
	rm -rf dist build/wheel
	$(PY) setup.py -q sdist
	$(PY) -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel dist/*.tar.gz
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl

# The C++ loops without torch, against double precision: every instruction set that this machine runs, and AMX's on a
# model of its registers.
CMAKE := $(VENV)/bin/cmake
LOOPS := build/loops

loops: $(STAMP)
	$(CMAKE) -S . -B $(LOOPS) -DRADA_LOOPS_TEST=ON $(CMAKE_ARGS)
	$(CMAKE) --build $(LOOPS) --parallel 2
	$(EMULATOR) $(LOOPS)/loops_test $(ARGS)

# The same for aarch64: cross-compiled, and run by an emulator.
CROSS := aarch64-linux-gnu-g++
QEMU := qemu-aarch64

cross-aarch64:
	@for tool in $(CROSS) $(QEMU); do command -v $$tool >/dev/null || { \
		echo "$$tool was not found; on Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(MAKE) loops LOOPS=build/aarch64 EMULATOR="$(QEMU) -cpu max" CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux \
		-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(CROSS) -DCMAKE_EXE_LINKER_FLAGS=-static"

# The loops and the operators under AddressSanitizer and UndefinedBehaviorSanitizer, of one build, and the loops, without
# torch's thread pool in between, under ThreadSanitizer. Left out of the operators' tests is what repeats the loops: many
# sizes and scales, and instruction sets.
SANITIZED := build/sanitize
SANITIZERS = $(shell $${CXX:-c++} -print-file-name=libasan.so) $(shell $${CXX:-c++} -print-file-name=libubsan.so)

sanitize: $(STAMP)
	RADA_CMAKE_ARGS="-DRADA_SANITIZE=address,undefined -DRADA_LOOPS_TEST=ON" \
		$(PY) setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	$(SANITIZED)/objects/loops_test
	$(MAKE) loops LOOPS=$(SANITIZED)/threads CMAKE_ARGS=-DRADA_SANITIZE=thread
	RADA_CPU_LIBRARY=$(abspath $(SANITIZED))/rada_kernels/rada_cpu.so LD_PRELOAD="$(SANITIZERS)" \
		ASAN_OPTIONS=detect_leaks=0 $(PY) -m pytest tests/kernels/test_cpu_operators.py tests/kernels/test_backends.py \
		-k "cpu and not any_size and not scales and not other_instruction_sets" -m "not slow" $(ARGS)

bench: $(STAMP)
	$(PY) bench/kernels.py $(ARGS)

# On a machine with a GPU: nothing is installed, the torch that PYTHON has is used.
gpu:
	$(PYTHON) bench/gpu.py $(ARGS)

gpu-long:
	$(PYTHON) bench/gpu.py --long $(ARGS)

compile-report: $(STAMP)
	PYTHONPATH=bench $(PY) -m codegen.compile_report $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# Installed again when what it is made from changes; the exact versions stand in constraints.txt.
$(STAMP): pyproject.toml setup.py build_hooks.py constraints.txt CMakeLists.txt $(filter rada_kernels/%,$(CPP))
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision setuptools cmake
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[demo,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
