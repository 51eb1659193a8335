"""What the triton backend does in a pass, recorded without a GPU: its launches and torch's own calls between them.

The operator runs on tensors of the meta device, so that whatever would wait for a number from the device raises here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction
from workloads import LOGIT_SCALE, Workload

from rada_kernels import Options, Params
from rada_kernels.backends import triton as backend
from rada_kernels.launch import Device, planning_for
from rada_kernels.options import Wanted


def tensor_bytes(values) -> int:
    """Bytes of the distinct tensors among some values."""
    tensors = {id(value): value for value in values if isinstance(value, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def bytes(self) -> int:
        """Bytes moved between device memory and the multiprocessors' side, each tensor passed over once."""
        return tensor_bytes(self.arguments.values())


@dataclass(frozen=True)
class TorchCall:
    """One call of torch that computes something."""

    name: str
    flop: int  # of its matrix product, if it is one
    bytes: int  # operands and results, once each
    dtype: torch.dtype


class _TorchCalls(TorchDispatchMode):
    """Appends to a list what is called within it; views and empty tensors are no work."""

    def __init__(self, calls: list):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        if not function.is_view and "empty" not in name and name not in ("detach", "_unsafe_view"):
            count = flop_registry.get(function.overloadpacket)
            flop = count(*args, **kwargs, out_val=out) if count else 0
            tensors = [leaf for leaf in tree_leaves((out, args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.calls.append(TorchCall(name, flop, tensor_bytes(tensors), tensors[0].dtype))
        return out


@contextlib.contextmanager
def float32_precision(setting: str) -> Iterator[None]:
    """Within it, torch.get_float32_matmul_precision() is this setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def record_calls(load: Workload, mode: str, dtype: torch.dtype, device: Device) -> list[Launch | TorchCall]:
    """What a workload's forward pass or step would do on a device, in its order. No loss, no optimiser."""
    calls: list[Launch | TorchCall] = []

    def record(kernel, *args, grid, warmup, **arguments):
        calls.append(Launch(kernel, grid, arguments))

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    width = load.width
    layers = [meta(width, width) if i % 2 == 0 else meta(width) for i in range(12)]
    params = Params(*layers, logit_scale=torch.tensor(LOGIT_SCALE, device="meta"))
    image, text = meta(load.batch, width), meta(load.classes, width)
    options = Options(num_heads=load.heads)
    run = JITFunction.run
    JITFunction.run = record
    try:
        with planning_for(device), _TorchCalls(calls):
            sums, deviation, kept = backend.forward(image, text, params, options, mode != "forward")
            if mode != "forward":
                features = mode == "step-features"
                wanted = Wanted(features, features, True)
                backend.backward(sums, deviation, image, text, params, kept, options, wanted)
    finally:
        JITFunction.run = run
    return calls


def record_launches(load: Workload, mode: str, dtype: torch.dtype, device: Device) -> list[Launch]:
    """The Triton launches alone."""
    return [call for call in record_calls(load, mode, dtype, device) if isinstance(call, Launch)]
