"""A launch prepared for one call serves another only where Triton would take the same code, by the same grid."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

from rada_kernels import Options, Params
from rada_kernels.backends import triton as backend
from rada_kernels.options import QUERIES, Wanted
from rada_kernels.triton_common import target as targets
from rada_kernels.triton_common.device import KIB, Device
from rada_kernels.triton_common.target import Target

pytest.importorskip("triton")
WIDTH = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def specialisation(kernel, arguments: dict) -> tuple:
    """What Triton's own binder says that code is compiled for: types, alignments, constants; and the launch options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    compiler = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
    _, found, options = bind(**arguments)
    return found, options


class Prepared(Target):
    """Nothing is launched. Notes for each launch what it was prepared for and what it got."""

    def __init__(self, shared: bool):
        super().__init__(Device("sm_90", 227 * KIB), configs={})
        self.shared, self.prepared, self.launches = shared, 0, []

    def plan(self, key):
        return super().plan(key) if self.shared else {}

    def prepare(self, *launch):
        prepared = super().prepare(*launch)
        leaves = tree_leaves(list(prepared.own.values()))
        memory = [leaf for leaf in leaves if torch.is_tensor(leaf) or hasattr(leaf, "base")]  # a descriptor's
        assert not memory, "each call has its own: it takes `tensors`"
        return prepared

    def launcher(self, kernel, grid, arguments):
        self.prepared += 1
        compiled = specialisation(kernel, arguments)

        def launch(arguments: dict) -> None:
            self.launches.append((kernel.__name__, grid, compiled, specialisation(kernel, arguments)))

        return launch


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same at an address that is no multiple of 16."""
    whole = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return whole[1:].view(tensor.shape).copy_(tensor)


def run(target: Target, dtype, batch, classes, options, wanted, *, linear=False, odd="", out=None) -> None:
    """A forward and a backward pass. linear: without the penalty's gradient; odd: whose address is none."""
    tensors = {"image": torch.randn(batch, WIDTH, dtype=dtype), "text": torch.randn(classes, WIDTH, dtype=dtype)}
    tensors |= {
        name: torch.randn(*(WIDTH,) * (1 + (i % 2 == 0)), dtype=dtype) for i, name in enumerate(Params._fields[:12])
    }
    tensors |= {"logit_scale": torch.tensor(20.0), "sums": torch.randn(batch, classes), "deviation": torch.randn(batch)}
    tensors = {name: shifted(tensor) if name in odd.split() else tensor for name, tensor in tensors.items()}
    image, text, sums, deviation = (tensors.pop(name) for name in ("image", "text", "sums", "deviation"))
    params = Params(**tensors)
    _, _, saved = backend.forward(image, text, params, options, True, target)
    backend.forward(image, text, params, options, False, target)
    upstream = sums, None if linear else deviation
    backend.backward(*upstream, image, text, params, saved, options, wanted, target)


EVERYTHING, FEATURES, LAYERS = Wanted(True, True, True), Wanted(True, False, False), Wanted(False, False, True)
CASES = [
    *itertools.product(DTYPES, (1, 3, 9), (5, 16, 40, 600), (Options(2),), (EVERYTHING,)),
    *itertools.product(DTYPES[:1], (2,), (17,), (Options(2), Options(2, normalize=False)), (FEATURES, LAYERS)),
    *itertools.product(DTYPES[:1], (2,), (17,), (Options(1), Options(1, penalty="l1")), (EVERYTHING,)),
    *itertools.product(DTYPES[::2], (2,), (17,), [Options(2, queries=(q,)) for q in QUERIES], (EVERYTHING,)),
]  # fmt: skip


def test_a_prepared_launch_is_what_triton_would_take():
    """All cases by one target, twice, against a target that prepares every launch anew."""
    shared, anew = Prepared(shared=True), Prepared(shared=False)
    for case in CASES * 2:
        for target in (shared, anew):
            run(target, *case)
    odd = ("image", "text", "key_weight", "out_bias", "logit_scale", "sums", "deviation", "sums deviation image")
    for name, linear in [(name, False) for name in odd] * 2 + [("", True), ("", False)]:
        for target in (shared, anew):
            run(target, torch.bfloat16, 3, 5, Options(2), EVERYTHING, odd=name, linear=linear)
    for launch, fresh in zip(shared.launches, anew.launches, strict=True):
        name, _, compiled, given = launch
        assert compiled == given, name
        assert launch == fresh, name
    assert shared.prepared < len(shared.launches) / 2 + 13 * len(odd)


def test_chunks_of_images_have_plans_of_their_own(monkeypatch):
    """The last chunk is smaller, and with an odd number of classes upstream gradients begin anywhere."""
    monkeypatch.setenv("RADA_SAVE_BYTES", "0")
    monkeypatch.setattr(backend, "CHUNK_BYTES", 3 * backend._image_bytes(torch.empty(1, WIDTH), 5, Options(2)))
    shared, anew = Prepared(shared=True), Prepared(shared=False)
    for batch in (3, 7, 7, 8):
        for target in (shared, anew):
            run(target, torch.float32, batch, 5, Options(2), EVERYTHING)
    assert shared.launches == anew.launches
    assert all(compiled == given for _, _, compiled, given in shared.launches)


def test_plans_are_bounded():
    """A run whose sizes never come again must not keep all of them."""
    target = Target(Device("sm_90", 227 * KIB), configs={})
    first = target.plan(("first",))
    first["kept"] = True
    assert target.plan(("first",)) is first
    for number in range(targets.PLANS):
        target.plan((number,))
    assert target.plan(("first",)) == {}


THROUGH_TRITON = """
import sys
import torch
import stub_driver
stub_driver.install()
from triton.backends.nvidia.driver import CudaLauncher
from rada_kernels import Options, Params
from rada_kernels.backends import triton as backend
from rada_kernels.triton_common.device import KIB, Device
from rada_kernels.triton_common.target import Gpu

sent = []

def note(self, x, y, z, stream, function, *rest, launch=CudaLauncher.__call__):
    launch(self, x, y, z, stream, function, *rest)
    sent.append((x, y, z, stream, function, rest[4:]))

CudaLauncher.__call__ = note

def pointers(values):
    if isinstance(values, tuple):
        return [pointers(value) for value in values]
    return values.data_ptr() if isinstance(values, torch.Tensor) else values

class Twice(Gpu):
    def launcher(self, kernel, grid, arguments):
        launch = super().launcher(kernel, grid, arguments)
        def twice(arguments):
            launch(arguments)
            kernel[grid](**arguments)
        return twice

target = Twice(Device("sm_90", 227 * KIB), configs={})
width = 16
layers = [torch.randn(width, width) if i % 2 == 0 else torch.randn(width) for i in range(12)]
params = Params(*layers, logit_scale=torch.tensor(20.0))
whole, text = torch.randn(3 * width + 1), torch.randn(5, width)
aligned, odd = whole[:-1].view(3, width), whole[1:].view(3, width)
functions = []
for image in (aligned, odd, aligned, odd):
    sent.clear()
    backend.forward(image, text, params, Options(2), False, target)
    for mine, own in zip(sent[::2], sent[1::2], strict=True):
        assert mine[:5] == own[:5], (mine[:5], own[:5])
        assert pointers(mine[5]) == pointers(own[5])
    assert len(sent) == 6
    functions.append([launch[4] for launch in sent[::2]])
assert functions[0] == functions[2] != functions[1] == functions[3], "an odd address has code of its own"
"""


def test_what_reaches_the_driver_is_what_tritons_own_launch_sends():
    code = f"import sys; sys.path[:0] = ['bench']\n{THROUGH_TRITON}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
