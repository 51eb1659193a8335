"""What is measured: named workloads, modes, suites, and the tensors of a workload."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from rada_kernels import Options, Params

# forward: logits without gradients. step: forward and backward with frozen features. step-features: the same
# with gradients for image and text features as well.
MODES = ("forward", "step", "step-features")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LOGIT_SCALE = 100.0  # CLIP's, after training
# Keys and values spread by about this, attention scores by about 1 and the mask by a tenth or more, as in a head
# that has learned something. The zero output layer of a fresh head would hide every error before it.
KEY_SPREAD = 0.8


@dataclass(frozen=True)
class Workload:
    """B images against K classes of width D in H heads."""

    name: str
    batch: int
    classes: int
    width: int
    heads: int = 8
    inference_only: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES[:1] if self.inference_only else MODES


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("eurosat", 128, 10, 512),
        Workload("caltech101", 32, 100, 512),
        Workload("imagenet-r", 64, 200, 512),
        Workload("sun397", 32, 397, 512),
        Workload("imagenet", 32, 1000, 512),
        Workload("imagenet-vitl", 32, 1000, 768),
        Workload("imagenet-large-batch", 512, 1000, 512, inference_only=True),
        Workload("imagenet21k-slice", 4, 4096, 512),
    )
}


def workload(name: str) -> Workload:
    """The workload of that name, or of that size, written as b32-k100-d512. Raises ValueError for others."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    size = re.fullmatch(r"b([1-9]\d*)-k([1-9]\d*)-d([1-9]\d*)", name)
    if not size or int(size[3]) % 8:
        raise ValueError(
            f"workload: got {name!r}; it takes one of {', '.join(WORKLOADS)}, or a size such as "
            "b32-k100-d512 (B images, K classes, width D, a multiple of the 8 heads)"
        )
    return Workload(name, *map(int, size.groups()))


@dataclass(frozen=True)
class Cell:
    """What is measured in the same rounds: one workload, mode and dtype, by every method."""

    workload: Workload
    mode: str
    dtype: str
    compiled: bool = True  # with the compiled baselines, which take a quarter of a minute each to compile

    def __str__(self) -> str:
        return f"{self.workload.name} {self.mode} {self.dtype}"


def _cells(names: list[str], modes: tuple[str, ...], dtypes: tuple[str, ...], compiled: bool = True) -> list[Cell]:
    return [
        Cell(load, mode, dtype, compiled)
        for load in map(workload, names)
        for dtype in dtypes
        for mode in modes
        if mode in load.modes
    ]


_OVER_K = [f"b8-k{classes}-d512" for classes in (25, 50, 100, 200, 400)]
_OVER_B = [f"b{batch}-k100-d512" for batch in (1, 4, 16, 64)]
_OVER_K_FAR = [f"b8-k{classes}-d512" for classes in (800, 1600, 3200)]
_HALF = ("float32", "bfloat16")
SUITES = {
    "quick": [
        *_cells(["eurosat", "caltech101", "imagenet-r"], ("forward", "step"), ("float32",)),
        *_cells(["caltech101"], ("step-features",), ("float32",), compiled=False),
        *_cells(["imagenet"], ("forward",), ("float32",)),
        *_cells(["imagenet-r"], ("forward", "step"), ("bfloat16",)),
        *_cells(_OVER_K + _OVER_B, ("forward",), ("float32",), compiled=False),
    ],
    "paper": _cells(list(WORKLOADS), MODES, _HALF),
    "training": _cells(list(WORKLOADS), ("step", "step-features"), _HALF),
    "inference": _cells(list(WORKLOADS), ("forward",), _HALF),
    "sweep": _cells(_OVER_K + _OVER_K_FAR + _OVER_B + ["b256-k100-d512"], ("forward", "step"), _HALF),
}


def choose_cells(
    suite: str, workloads: list[str] | None, modes: list[str] | None, dtypes: list[str] | None
) -> list[Cell]:
    """The cells of a suite. Workloads take the place of the suite's own; modes and dtypes narrow the suite down, or
    say in what the given workloads are measured.

    Raises ValueError for a name that does not exist, with those that do, and where nothing is left to measure.
    """
    known = {"suite": ([suite], SUITES), "mode": (modes or [], MODES), "dtype": (dtypes or [], DTYPES)}
    for kind, (names, existing) in known.items():
        for name in names:
            if name not in existing:
                raise ValueError(f"{kind}: got {name!r}; it takes one of {', '.join(existing)}")
    cells = SUITES[suite]
    if workloads:
        all_modes = modes or list(dict.fromkeys(cell.mode for cell in cells))
        all_dtypes = dtypes or list(dict.fromkeys(cell.dtype for cell in cells))
        cells = _cells(workloads, tuple(all_modes), tuple(all_dtypes))
    cells = [cell for cell in cells if cell.mode in (modes or MODES) and cell.dtype in (dtypes or DTYPES)]
    if not cells:
        raise ValueError(f"modes, dtypes: suite {suite} has nothing of {modes or 'any'}, {dtypes or 'any'}")
    return cells


@dataclass(frozen=True)
class Inputs:
    """The tensors of a cell. In the step modes, what is to get a gradient requires one."""

    image: Tensor  # [B, D]
    text: Tensor  # [K, D]
    params: Params
    labels: Tensor  # [B]
    options: Options
    mode: str

    @property
    def differentiated(self) -> list[Tensor]:
        """The twelve layer tensors, then image and text features, as far as the mode asks for their
        gradients.
        """
        if self.mode == "forward":
            return []
        return self.params.layers + ([self.image, self.text] if self.mode == "step-features" else [])

    def to(self, dtype: torch.dtype, mode: str, images: slice | Tensor = slice(None)) -> Inputs:
        """The same numbers in another dtype, for another mode, or some of the images only."""
        layers = [layer.detach().to(dtype) for layer in self.params.layers]
        params = Params(*layers, logit_scale=self.params.logit_scale)
        image, text = self.image.detach()[images].to(dtype), self.text.detach().to(dtype)
        inputs = Inputs(image, text, params, self.labels[images], self.options, mode)
        for tensor in inputs.differentiated:
            tensor.requires_grad_()
        return inputs


def make_inputs(load: Workload, mode: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The tensors of a workload: random features, labels and layers, the same in every process."""
    generator = torch.Generator().manual_seed(load.classes)
    width = load.width

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator)).to(device, dtype)

    image, text = normal(load.batch, width), normal(load.classes, width)
    layers = []
    over_x = KEY_SPREAD * width**0.5 / LOGIT_SCALE  # the elements of X spread by s / D
    for std in [over_x] * 5 + [width**-0.5]:  # the output layer is the last
        layers += [normal(width, width, std=std), normal(width, std=0.02)]
    labels = torch.randint(load.classes, (load.batch,), generator=generator).to(device)
    # A tensor, as models have it; a Python number would be copied to the device in every call.
    params = Params(*layers, logit_scale=torch.tensor(LOGIT_SCALE, device=device))
    return Inputs(image, text, params, labels, Options(num_heads=load.heads), mode).to(dtype, mode)
