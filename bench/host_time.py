"""What a call of the triton backend costs the host: python bench/host_time.py

Its tensors are small and its launches end at a driver that does nothing (stub_driver), so that what is left is Python,
torch's own calls and Triton's launcher. Outside of a CUDA graph this is the least time of a call, however fast the
device is. Microseconds of the processor, median of rounds; once more without Triton's launcher. Kernels are compiled
first, a minute where Triton has none in its cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import stub_driver
import torch
from workloads import DTYPES

from rada_kernels import Options, Params
from rada_kernels.backends import triton as backend
from rada_kernels.ops import pack_options
from rada_kernels.options import Wanted
from rada_kernels.triton_common.device import KIB, Device
from rada_kernels.triton_common.target import Gpu, Target

SM_90 = Device("sm_90", 227 * KIB)


class Silent(Target):
    """A device on which nothing is launched."""

    def run(self, kernel, grid, arguments) -> None:
        pass


def passes(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A forward pass, a step of layers and features, and the same by torch's dispatcher and autograd, of two images and
    two classes of width 16.
    """
    image, text = torch.randn(2, 16, dtype=dtype), torch.randn(2, 16, dtype=dtype)
    layers = [torch.randn(16, 16, dtype=dtype) if i % 2 == 0 else torch.randn(16, dtype=dtype) for i in range(12)]
    params, options = Params._make((*layers, torch.tensor(100.0), None)), Options(1)
    call = image, text, params, options

    def forward():
        return backend.forward(*call, False)

    def step():
        sums, deviation, saved = backend.forward(*call, True)
        return backend.backward(sums, deviation, *call[:3], saved, options, Wanted(True, True, True))

    leaves = [tensor.clone().requires_grad_() for tensor in (image, text, *layers)]

    def by_autograd():
        sums, deviation, _ = torch.ops.rada.masked_similarity(
            *leaves[:2], params.scale, leaves[2:], *pack_options(options, "triton"), True
        )
        return torch.autograd.grad((sums, deviation), leaves, (sums, deviation))

    return {"forward": forward, "step": step, "step by autograd": by_autograd}


def host_us(run: Callable[[], object], calls: int = 20) -> float:
    start = time.thread_time()
    for _ in range(calls):
        run()
    return 1e6 * (time.thread_time() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stub_driver.install()
    targets = {"": Gpu(SM_90, configs={}), ", without Triton's launcher": Silent(SM_90, configs={})}
    times: dict[str, list[float]] = {}
    runs = passes(DTYPES[options.dtype])
    for _ in range(1 + options.rounds):
        for label, target in targets.items():
            with mock.patch.object(backend, "target_of", lambda tensor, target=target: target):
                for name, run in runs.items():
                    times.setdefault(name + label, []).append(host_us(run))
    for name, measured in times.items():
        print(f"{name}: {statistics.median(measured[1:]):.0f} us")


if __name__ == "__main__":
    main()
