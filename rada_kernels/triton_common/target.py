"""Where launches go: a device, its configurations, and the rule by which a configuration is made to fit it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rada_kernels.triton_common.config import ConfigT, config_key, tuned, tuned_file
from rada_kernels.triton_common.device import INTERPRETER, Device, gpu

Grid = tuple[int, ...]
PLANS = 256  # kept of a target: sizes of calls, some kilobytes each


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


@dataclass(frozen=True)
class Prepared:
    """What launches share that differ in the tensors' memory alone."""

    asked: Any  # the configuration that was to be made to fit
    config: Any  # that fits
    own: dict  # the arguments that follow from it, tensors aside
    launch: Callable[[dict], None]  # of all arguments


class Target:
    """A device to launch on. Subclasses say how a kernel is run there, and what it takes once it is compiled.

    configs: {config_key: fields} that are preferred to the tables'; None: those of RADA_TUNED.
    """

    def __init__(self, device: Device, configs: Mapping[str, Mapping[str, int]] | None = None):
        self.device = device
        self.configs = configs
        self.compiled_in: dict[int, Callable[[dict], tuple]] = {}  # which arguments, by kernel
        self.fitted: dict[tuple, Any] = {}  # by kernel and what is compiled in
        self._plans: Callable[[tuple], dict] = functools.lru_cache(PLANS)(lambda key: {})

    def config(self, kernel: str, dtype: torch.dtype, sizes: tuple[int, ...], default: ConfigT) -> ConfigT:
        """A kernel's configuration; sizes: what tells its configurations apart."""
        entries = tuned_file() if self.configs is None else self.configs
        return tuned(config_key(kernel, self.device, dtype, *sizes), entries, default)

    def plan(self, key: tuple) -> dict:
        """Where calls of this key keep what they share; empty at first."""
        return self._plans(key)

    def prepare(
        self,
        kernel,
        config: ConfigT,
        blocks: Callable[[ConfigT], tuple[Grid, dict]],
        tensors: Callable[[ConfigT], dict],
        keep: tuple[str, ...],
        arguments: dict,
    ) -> Prepared:
        """A kernel's launch by a configuration, or by the halving of it that `fit` finds when it is first compiled.

        The other arguments are those of `Call.launch`. What is compiled in follows from the arguments that are neither
        numbers nor tensors, from maxnreg and from whether there are descriptors, which come in arguments named blocks.
        """

        def complete(config: ConfigT) -> tuple[Grid, dict, dict]:
            grid, own = blocks(config)
            own |= {"C": config, "num_warps": config.num_warps, "num_stages": config.num_stages}
            return grid, own, {**arguments, **own, **tensors(config)}

        def usage_of(config: ConfigT) -> Usage | None:
            grid, _, everything = complete(config)
            return self.usage(kernel, grid, everything)

        _, _, everything = complete(config)
        identity = id(kernel)  # a kernel's own hash takes microseconds
        if identity not in self.compiled_in:
            names = [name for name, value in everything.items() if _is_compiled_in(value)]
            self.compiled_in[identity] = operator.itemgetter(*names)
        described = any(name.endswith("blocks") and value for name, value in everything.items())
        key = identity, self.compiled_in[identity](everything), everything.get("maxnreg"), described
        fitted = self.fitted.get(key)
        if fitted is None:
            fitted = self.fitted[key] = fit(config, usage_of, self.device.shared_bytes, keep)
        grid, own, everything = complete(fitted)
        return Prepared(config, fitted, own, self.launcher(kernel, grid, everything))

    def launcher(self, kernel, grid: Grid, arguments: dict) -> Callable[[dict], None]:
        """Launches a kernel with arguments that are like these in all that it is compiled for."""
        return functools.partial(self.run, kernel, grid)

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

    def launcher(self, kernel, grid: Grid, arguments: dict) -> Callable[[dict], None]:
        """Without Triton's look at the arguments, which takes longer than all the rest of a launch."""
        if torch.version.hip:  # where code depends on which tensors are below 2 GB
            return super().launcher(kernel, grid, arguments)
        compiled = kernel.warmup(grid=grid, **arguments)[(*grid, 1, 1)]
        in_order = operator.itemgetter(*kernel.arg_names)
        return lambda arguments: compiled(*in_order(arguments))


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
