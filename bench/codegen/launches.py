"""What the triton backend does in a pass, recorded without a GPU: its launches and torch's own calls between them.

The operator runs on tensors of the meta device, so that whatever would wait for a number from the device raises here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from workloads import LOGIT_SCALE, Workload

from rada_kernels import Options, Params
from rada_kernels.backends import triton as backend
from rada_kernels.options import Wanted
from rada_kernels.triton_common.device import KIB, Device
from rada_kernels.triton_common.target import Grid, Target, Usage

# Shared memory that a program may use.
SHARED_BYTES = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
    "gfx1100": 64 * KIB,
}
# Of an A100, an H100 SXM and a B200; of the others the number that Device takes if not told.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}


def device_named(arch: str) -> Device:
    return Device(arch, SHARED_BYTES[arch], MULTIPROCESSORS.get(arch, Device.multiprocessors))


def tensors_of(values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, torch.Tensor)]


def described_of(values) -> list[torch.Tensor]:
    """What tensor descriptors among them are of."""
    return [leaf.base for leaf in tree_leaves(list(values)) if isinstance(leaf, TensorDescriptor)]


def tensor_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the distinct ones, of views of one memory the largest."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        memory, size = tensor.untyped_storage()._cdata, tensor.numel() * tensor.element_size()
        sizes[memory] = max(size, sizes.get(memory, 0))
    return sum(sizes.values())


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
        return tensor_bytes(tensors_of(self.arguments.values()))

    def bytes_but(self, unread: Iterable[int]) -> int:
        """The same without those at these places among the kernel's pointers, which its code does not touch, and with
        those that it reaches by descriptors.
        """
        ordered = (self.arguments[name] for name in self.kernel.arg_names if name in self.arguments)
        touched = [t for at, t in enumerate(tensors_of(ordered)) if at not in unread]
        return tensor_bytes(touched + described_of(self.arguments.values()))


@dataclass(frozen=True)
class TorchCall:
    """One call of torch that computes something."""

    name: str
    flop: int  # of its matrix product, if it is one
    bytes: int  # operands and results, once each
    dtype: torch.dtype  # of its first operand
    launches: int = 1


class TorchCalls(TorchDispatchMode):
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
            tensors = tensors_of((out, args, kwargs))
            # Of tensors in one dtype torch makes one launch, of several dtypes one for each tensor.
            lists = [argument for argument in args if isinstance(argument, list | tuple)]
            mixed = name.startswith("_foreach_") and any(len({t.dtype for t in one}) > 1 for one in lists)
            launches = len(lists[0]) if mixed else 1
            dtype = (tensors_of(args) or tensors)[0].dtype
            self.calls.append(TorchCall(name, flop, tensor_bytes(tensors), dtype, launches))
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


class Recorder(Target):
    """A device that is not here: launches are noted. usage_of: what a launch's compiled kernel takes, if known."""

    def __init__(
        self,
        device: Device,
        usage_of: Callable[[Launch], Usage | None] = lambda launch: None,
        configs: Mapping[str, Mapping[str, int]] | None = None,
    ):
        super().__init__(device, configs)
        self.usage_of = usage_of
        self.calls: list[Launch | TorchCall] = []

    def usage(self, kernel, grid: Grid, arguments: dict) -> Usage | None:
        return self.usage_of(Launch(kernel, grid, arguments))

    def run(self, kernel, grid: Grid, arguments: dict) -> None:
        self.calls.append(Launch(kernel, grid, arguments))


def record_calls(load: Workload, mode: str, dtype: torch.dtype, recorder: Recorder) -> list[Launch | TorchCall]:
    """What a workload's forward pass or step would do on a device, in its order. No loss, no optimiser."""

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    recorder.calls = calls = []
    width = load.width
    layers = [meta(width, width) if i % 2 == 0 else meta(width) for i in range(12)]
    params = Params(*layers, logit_scale=torch.tensor(LOGIT_SCALE, device="meta"))
    image, text = meta(load.batch, width), meta(load.classes, width)
    options = Options(num_heads=load.heads)
    with TorchCalls(calls):
        sums, deviation, kept = backend.forward(image, text, params, options, mode != "forward", recorder)
        if mode != "forward":
            features = mode == "step-features"
            wanted = Wanted(features, features, True)
            backend.backward(sums, deviation, image, text, params, kept, options, wanted, recorder)
    return calls


def record_launches(load: Workload, mode: str, dtype: torch.dtype, recorder: Recorder) -> list[Launch]:
    """The Triton launches alone."""
    return [call for call in record_calls(load, mode, dtype, recorder) if isinstance(call, Launch)]
