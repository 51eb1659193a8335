"""Where launches go: a device, its configurations, and the rule by which a configuration is made to fit it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rada_kernels.triton_common.config import ConfigT, config_key, tuned, tuned_file
from rada_kernels.triton_common.device import INTERPRETER, Device, gpu

Grid = tuple[int, ...]
Configured = TypeVar("Configured")  # a configuration, or whatever else follows from the same


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes of its device."""

    shared_bytes: int
    spill_bytes: int  # a thread's, in local memory


def fit(
    config: ConfigT, usage_of: Callable[[ConfigT], Usage | None], shared_bytes: int, keep: tuple[str, ...] = ()
) -> ConfigT:
    """The first of a configuration and its halvings that is within shared memory and spills no register.

    Beyond shared memory, pipeline stages go before blocks. Where every halving spills, the one that spills least.
    usage_of: what the compiled kernel takes; None: unknown, and taken to fit. keep: blocks that are not halved.
    Raises ValueError where not even the smallest is within shared memory.
    """
    spilling: dict[ConfigT, int] = {}
    while True:
        usage = usage_of(config)
        if usage is None:
            return config
        fits = usage.shared_bytes <= shared_bytes
        if fits and not usage.spill_bytes:
            return config
        if fits:
            spilling[config] = usage.spill_bytes
        less_ahead = not fits and config.num_stages > 1
        smaller = config.changed(num_stages=config.num_stages - 1) if less_ahead else config.halved(keep)
        if smaller is None:
            if spilling:
                return min(spilling, key=spilling.__getitem__)
            raise ValueError(f"{config}: it takes {usage.shared_bytes} bytes of shared memory; got {shared_bytes}")
        config = smaller


class Target:
    """A device to launch on. Subclasses say how a kernel is run there, and what it takes once it is compiled.

    configs: {config_key: fields} that are preferred to the tables'; None: those of RADA_TUNED.
    """

    def __init__(self, device: Device, configs: Mapping[str, Mapping[str, int]] | None = None):
        self.device = device
        self.configs = configs
        self.compiled_in: dict[int, Callable[[dict], tuple]] = {}  # which arguments, by kernel
        self.fitted: dict[tuple, Any] = {}  # by kernel and what is compiled in
        self.known: dict[tuple, Any] = {}  # configurations, by what they follow from

    def config(self, kernel: str, dtype: torch.dtype, sizes: tuple[int, ...], default: ConfigT) -> ConfigT:
        """A kernel's configuration; sizes: what tells its configurations apart."""
        entries = tuned_file() if self.configs is None else self.configs
        return tuned(config_key(kernel, self.device, dtype, *sizes), entries, default)

    def configured(
        self, configure: Callable[..., Configured], shapes, sizes: tuple[int, ...], tuned: str | None
    ) -> Configured:
        """configure(self, shapes, *sizes), asked once. tuned: the file that RADA_TUNED names."""
        key = configure, shapes, sizes, tuned
        config = self.known.get(key)
        if config is None:
            config = self.known[key] = configure(self, shapes, *sizes)
        return config

    def launch(
        self,
        kernel,
        config: ConfigT,
        blocks: Callable[[ConfigT], tuple[Grid, dict]],
        *,
        keep: tuple[str, ...] = (),
        **arguments: Any,
    ) -> dict:
        """Launch a kernel by a configuration, or by the halving of it that `fit` finds when it is first compiled.

        blocks: the grid, and the arguments that follow from a configuration. What is compiled in follows from the
        arguments that are neither numbers nor tensors, from maxnreg and from whether there are descriptors, `blocks`.
        Returns all arguments of the launch.
        """

        def complete(config: ConfigT) -> tuple[Grid, dict]:
            grid, own = blocks(config)
            options = {"C": config, "num_warps": config.num_warps, "num_stages": config.num_stages}
            return grid, {**arguments, **own, **options}

        grid, everything = complete(config)
        identity = id(kernel)  # a kernel's own hash takes microseconds
        if identity not in self.compiled_in:
            names = [name for name, value in everything.items() if _is_compiled_in(value)]
            self.compiled_in[identity] = operator.itemgetter(*names)
        described = len(everything.get("blocks", ())) > 0
        key = identity, self.compiled_in[identity](everything), everything.get("maxnreg"), described
        fitted = self.fitted.get(key)
        if fitted is None:
            limit = self.device.shared_bytes
            fitted = fit(config, lambda candidate: self.usage(kernel, *complete(candidate)), limit, keep)
            self.fitted[key] = fitted
        if fitted is not config and fitted != config:
            grid, everything = complete(fitted)
        self.run(kernel, grid, everything)
        return everything

    def usage(self, kernel, grid: Grid, arguments: dict) -> Usage | None:
        return None

    def run(self, kernel, grid: Grid, arguments: dict) -> None:
        kernel[grid](**arguments)


class Gpu(Target):
    """A CUDA or ROCm device: kernels are compiled and loaded before they are launched for the first time."""

    def usage(self, kernel, grid: Grid, arguments: dict) -> Usage | None:
        from triton.runtime.errors import OutOfResources

        compiled = kernel.warmup(grid=grid, **arguments)
        try:
            _ = compiled.run  # loads it, which says what it spills
        except OutOfResources as error:
            return Usage(max(error.required, self.device.shared_bytes + 1), 0)
        return Usage(compiled.metadata.shared, 4 * compiled.n_spills)


def _is_compiled_in(argument) -> bool:
    """Whether a kernel is compiled for this argument: it is neither a number nor tensors."""
    return type(argument) not in (int, float) and not isinstance(argument, Tensor | tuple)


@functools.lru_cache
def _gpu_target(index: int) -> Gpu:
    return Gpu(gpu(index))


@functools.lru_cache
def _interpreter() -> Target:
    return Target(INTERPRETER)


def target_of(tensor: Tensor) -> Target:
    """The target that a tensor is on: its GPU, or Triton's interpreter."""
    return _gpu_target(tensor.device.index) if tensor.is_cuda else _interpreter()
