"""What a call hands to every launcher: its inputs, its options, where it runs, and what of it is compiled in."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rada_kernels.options import Options, Params
from rada_kernels.triton_common.config import TUNED, ConfigT
from rada_kernels.triton_common.device import Device
from rada_kernels.triton_common.state import Features, Projections
from rada_kernels.triton_common.target import Grid, Target

Configured = TypeVar("Configured")  # a configuration, or whatever else follows from the same


@dataclass(frozen=True)
class Shapes:
    """What is compiled into the kernels of a call beside its launch configuration."""

    H: int
    E: int
    IMAGE: bool
    TEXT: bool
    RATIONAL: bool
    DTYPE: str  # of features, layers and all that is passed between steps, such as "bfloat16"
    PRECISION: str  # input_precision of the products

    @staticmethod
    @functools.lru_cache
    def of(options: Options, width: int, dtype: torch.dtype, device: Device, matmul_precision: str) -> Shapes:
        image, text, rational = (name in options.queries for name in ("image", "text", "rational"))
        precision = device.precision(dtype, matmul_precision)
        name = str(dtype).removeprefix("torch.")
        return Shapes(options.num_heads, width // options.num_heads, image, text, rational, name, precision)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.DTYPE)

    @property
    def D(self) -> int:
        return self.H * self.E

    @property
    def MATRIX(self) -> int:
        """Query kinds with a K x K matrix of scores: text, rational."""
        return self.TEXT + self.RATIONAL

    @property
    def KINDS(self) -> int:
        return self.IMAGE + self.MATRIX

    @property
    def LAYERS(self) -> int:
        """Layers over X: keys, values and, if in use, rational queries."""
        return 2 + self.RATIONAL


class Forgetful(dict):
    def __setitem__(self, key, value) -> None:
        pass


@dataclass
class Call:
    """Contiguous inputs of one dtype, and the target to launch on. B and K at least 1.

    What it shares with others of its sizes, dtypes and purpose is in `plan`: configurations, prepared launches, and
    what follows from the options. Triton compiles for dtypes, for addresses that are multiples of 16, and for
    constants, which follow from the rest of the plan's key. Memory that a call allocates is aligned.
    """

    image: Tensor  # [B, D]
    text: Tensor  # [K, D]
    params: Params  # logit_scale: float32
    options: Options
    target: Target
    purpose: tuple | None = None  # what else launches depend on, such as which pass it is; None: nothing is shared
    given: tuple[Tensor, ...] = ()  # its other tensors, [B, ...] where images come in chunks

    def __post_init__(self):
        (batch, width), classes = self.image.shape, self.text.shape[0]
        self.sizes = batch, classes, width  # B, K, D
        self.plan = Forgetful() if self.purpose is None else self.target.plan(self._key())
        self.shapes: Shapes
        self.factors: tuple[float, float]
        self.shapes, self.factors = self.plan.get(Call) or self._constants()

    def _key(self) -> tuple:
        inputs = (self.image, self.text, self.params.scale, *self.params.layers, *self.given)
        return (
            self.sizes, self.options, self.purpose, torch.get_float32_matmul_precision(), os.environ.get(TUNED),
            *[tensor.dtype for tensor in inputs], *[tensor.data_ptr() % 16 for tensor in inputs],
        )  # fmt: skip

    def _constants(self) -> tuple[Shapes, tuple[float, float]]:
        """shapes; factors: what queries bear of log2(e) / (√E τ), the factor of scores in base 2, and what is left to
        their products. In 16 bits all of it, rounded with the query; in float32 one more rounding would show where
        scores are large.
        """
        width, precision = self.image.shape[1], torch.get_float32_matmul_precision()
        factor = self.options.score_factor(width) * math.log2(math.e)
        factors = (1.0, factor) if self.dtype == torch.float32 else (factor, 1.0)
        shapes = Shapes.of(self.options, width, self.dtype, self.target.device, precision)
        self.plan[Call] = shapes, factors
        return shapes, factors

    def config(self, configure: Callable[..., Configured], *sizes: int) -> Configured:
        """A step's configure(target, shapes, *sizes), asked once. Sizes are of the call."""
        config = self.plan.get(configure)
        if config is None:
            config = self.plan[configure] = configure(self.target, self.shapes, *sizes)
        return config

    def launch(
        self,
        kernel,
        config: ConfigT,
        blocks: Callable[[ConfigT], tuple[Grid, dict]],
        *,
        tensors: Callable[[ConfigT], dict] = lambda config: {},
        keep: tuple[str, ...] = (),
        variant: object = None,
        **arguments: Any,
    ) -> dict:
        """Launch a kernel by a configuration, or by the halving of it that fits the device.

        blocks: the grid, and the numbers and constants that follow from a configuration. tensors: what does and has
        memory. keep: blocks that are not halved. variant: tells launches of one kernel within a call apart. Returns all
        arguments of the launch.
        """
        key = id(kernel), variant  # a kernel's own hash takes microseconds
        prepared = self.plan.get(key)
        if prepared is None or prepared.asked is not config:
            prepared = self.target.prepare(kernel, config, blocks, tensors, keep, arguments)
            self.plan[key] = prepared
        everything = {**arguments, **prepared.own, **tensors(prepared.config)}
        prepared.launch(everything)
        return everything

    @property
    def dtype(self) -> torch.dtype:
        return self.image.dtype

    def of_images(self, b: slice) -> Call:
        whole = b.start == 0 and b.stop >= self.image.shape[0]
        return self if whole else replace(self, image=self.image[b], given=tuple(tensor[b] for tensor in self.given))

    def features(self, projected: Projections) -> Features:
        return Features(self.image, self.text, projected.inverse_image, projected.inverse_text)
