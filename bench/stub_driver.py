"""A CUDA driver that does nothing, so that Triton compiles, loads and launches where there is no GPU.

All that a launch costs the host is real but the driver's own part. It takes a C compiler, and no GPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import torch

# What Triton's driver.c calls. It reads results: a context, 1024 threads a block, 227 KiB of shared memory.
SOURCE = r"""
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 * 1024; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "of the stub"; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
int cuModuleLoadData(void **module, const void *image) { static long count; *module = (void *)++count; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuOccupancyMaxActiveClusters(void) { return 0; }
int cuCtxGetLimit(void) { return 0; }
int cuCtxSetLimit(void) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuLaunchKernelEx(void) { return 0; }
"""


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """For the rest of the process Triton's active driver is this one, of a device of that compute capability."""
    if torch.cuda.is_available():
        raise RuntimeError("stub driver: this machine has a GPU; it takes one without, whose driver it would hide")
    folder = Path(tempfile.mkdtemp())
    library = folder / "libcuda.so.1"
    command = ["cc", "-O2", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-xc", "-", "-o", str(library)]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    (folder / "libcuda.so").symlink_to(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its name from here on
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    class StubDriver(CudaDriver):
        def __init__(self):
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: capability

    triton.runtime.driver.set_active(StubDriver())
