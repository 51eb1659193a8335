"""What interpreted kernels load, store and multiply: every address, by launch and program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from codegen.launches import Launch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from rada_kernels.triton_common.device import INTERPRETER, Device
from rada_kernels.triton_common.target import Target

GRANULE = 2  # bytes of the narrowest dtype: what overlaps shares a granule, whatever the widths of its accesses


@dataclass
class Access:
    """Granules of memory, each once for each program."""

    granules: np.ndarray  # [N] byte address / GRANULE
    programs: np.ndarray  # [N]


@dataclass
class Seen:
    """One launch."""

    launch: Launch
    flop: int = 0  # of its products
    # (program, granules, number of accesses before it); count: an atomic that orders accesses
    parts: dict[str, list[tuple[int, np.ndarray, int]]] = field(
        default_factory=lambda: {"load": [], "store": [], "atomic": [], "count": []}
    )

    def add(self, kind: str, program: int, pointers, mask) -> None:
        # The interpreter's masks may be integers, which numpy would take for places.
        mask = np.asarray(mask.data).astype(bool)
        wanted = np.broadcast_to(mask, np.broadcast_shapes(pointers.data.shape, mask.shape))
        addresses = np.unique(np.broadcast_to(pointers.data, wanted.shape)[wanted]).astype(np.int64)
        width = pointers.get_element_ty().primitive_bitwidth // 8
        assert width % GRANULE == 0
        assert not (addresses % width).any(), "unaligned"
        granules = (addresses[:, None] + np.arange(0, width, GRANULE)).ravel() // GRANULE
        self.parts[kind].append((program, granules, sum(map(len, self.parts.values()))))

    def of(self, *kinds: str) -> Access:
        by_program: dict[int, list[np.ndarray]] = {}
        for kind in kinds:
            for program, granules, _ in self.parts[kind]:
                by_program.setdefault(program, []).append(granules)
        unique = {program: np.unique(np.concatenate(parts)) for program, parts in by_program.items()}
        programs = [np.full(len(granules), program) for program, granules in unique.items()]
        empty = np.empty(0, np.int64)
        return Access(np.concatenate([empty, *unique.values()]), np.concatenate([empty, *programs]))

    @property
    def outside(self) -> np.ndarray:
        """Granules that are accessed and belong to none of the launch's tensors."""
        tensors = [tensor for tensor in _tensors(self.launch.arguments.values()) if tensor.numel()]
        first, count = (np.array(column) for column in zip(*map(_granules, tensors), strict=True))
        order = np.argsort(first)
        accessed = np.unique(self.of(*self.parts).granules)
        at = np.searchsorted(first[order], accessed, "right") - 1
        inside = (at >= 0) & (accessed < (first + count)[order][at])
        return accessed[~inside]

    def handed_over(self) -> Seen:
        """Without the loads of what was handed over: who is the last to raise a counter loads what others have stored
        before they raised it.
        """
        counters: dict[int, list[tuple[int, int]]] = {}
        for program, granules, number in self.parts["count"]:
            counters.setdefault(granules[0], []).append((program, number))
        loads = []
        for program, granules, number in self.parts["load"]:
            for *others, (last, raised) in counters.values():
                if program == last and number > raised:
                    before = dict(others)
                    stored = [g for writer, g, at in self.parts["store"] if at < before.get(writer, 0)]
                    granules = np.setdiff1d(granules, np.concatenate([np.empty(0, np.int64), *stored]))
            loads.append((program, granules, number))
        return Seen(self.launch, self.flop, self.parts | {"load": loads})

    def bytes_of(self, *kinds: str) -> int:
        """Distinct ones."""
        return GRANULE * len(np.unique(self.of(*kinds).granules))


def _granules(tensor: Tensor) -> tuple[int, int]:
    """The first, and how many."""
    return tensor.data_ptr() // GRANULE, tensor.numel() * tensor.element_size() // GRANULE


def _tensors(arguments) -> Iterator[Tensor]:
    """Those of a kernel's arguments: by themselves, within tuples, under descriptors."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            yield argument
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


class Recorded(Target):
    """The interpreter with a device's configurations, until the patch is undone; `launches` has what each did.

    backwards: the last program runs first.
    """

    def __init__(self, patch: pytest.MonkeyPatch, device: Device = INTERPRETER, backwards: bool = False):
        super().__init__(device, configs={})
        self.launches: list[Seen] = []
        self.program = 0
        builder = InterpreterBuilder
        index, dot, load, store, atomic = (
            builder.set_grid_idx,
            builder.create_dot,
            builder.create_masked_load,
            builder.create_masked_store,
            builder.create_atomic_rmw,
        )

        def set_grid_idx(builder, x, y, z):
            grid = (*self.launches[-1].launch.grid, 1, 1)
            if backwards:
                x = grid[0] - 1 - x
            self.program = x + grid[0] * (y + grid[1] * z)
            index(builder, x, y, z)

        def masked_load(builder, pointers, mask, *rest, **named):
            self.launches[-1].add("load", self.program, pointers, mask)
            return load(builder, pointers, mask, *rest, **named)

        def masked_store(builder, pointers, value, mask, *rest, **named):
            self.launches[-1].add("store", self.program, pointers, mask)
            return store(builder, pointers, value, mask, *rest, **named)

        def atomic_rmw(builder, operation, pointers, value, mask, sem, *rest):
            kind = "atomic" if sem.name == "RELAXED" else "count"
            self.launches[-1].add(kind, self.program, pointers, mask)
            return atomic(builder, operation, pointers, value, mask, sem, *rest)

        def counted_dot(builder, a, b, *rest):
            self.launches[-1].flop += 2 * a.data.size * b.data.shape[-1]
            return dot(builder, a, b, *rest)

        for name, recorded in {
            "set_grid_idx": set_grid_idx,
            "create_dot": counted_dot,
            "create_masked_load": masked_load,
            "create_masked_store": masked_store,
            "create_atomic_rmw": atomic_rmw,
        }.items():
            patch.setattr(InterpreterBuilder, name, recorded)

    def run(self, kernel, grid, arguments):
        self.launches.append(Seen(Launch(kernel.fn, grid, arguments)))
        super().run(kernel, grid, arguments)
