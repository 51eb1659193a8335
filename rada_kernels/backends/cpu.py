"""The `cpu` backend: the three steps in C++ vector loops, near the rate of the machine's own matrix products.

What needs no [B, K, D] rows stays here, in torch: normalising the rows, the image and text queries, and their part of
the gradients. float32 runs in float32; bfloat16 in the machine's bfloat16 dot products where it has them; float16, and
bfloat16 elsewhere, in float32 with one rounding at the end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rada_kernels.options import PENALTIES, Options, Params, Wanted
from rada_kernels.rows import inverse_norms, unit_rows_backward
from rada_kernels.tiling import MIB, SAVE_BYTES, budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# RADA_CPU_LIBRARY: another build of it, such as the one that `make sanitize` tests.
LIBRARY = Path(os.environ.get("RADA_CPU_LIBRARY") or Path(__file__).parent.parent / "rada_cpu.so")

# As in csrc/call.h: rows of scores per block, and the floats that a row of scores is rounded up to.
SCORE_ROWS = 32
SCORE_COLUMNS = 16
# A thread's room for the scores of one image and head, unless RADA_TILE_BYTES says otherwise. Above it, from
# K = 2048 on, scores stream: a third more arithmetic with the values, and memory that grows with K instead of K².
SCORE_BYTES = 32 * MIB


def _load() -> tuple[str, str, bool]:
    """The instruction set in use, why there is none, and whether it has bfloat16 dot products."""
    if not LIBRARY.exists():
        reason = LIBRARY.with_suffix(".missing")  # setup.py leaves it
        why = reason.read_text().strip() if reason.exists() else "install with a C++ compiler, CMake and torch"
        return "", f"{LIBRARY.name} was not built: {why}", False
    try:
        torch.ops.load_library(LIBRARY)
        return torch.ops.rada_cpu.instruction_set(), "", torch.ops.rada_cpu.has_bfloat16()
    except (OSError, RuntimeError) as error:
        return "", f"{LIBRARY.name} does not load: {error}", False


# Once, at import: torch.compile traces what asks for it.
INSTRUCTION_SET, MISSING, HAS_BFLOAT16 = _load()


def usable(dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int) -> tuple[bool, str]:
    if device.type != "cpu":
        return False, f"device {device}: it takes cpu"
    if dtype not in DTYPES:
        return False, f"dtype {dtype}: it takes one of {', '.join(map(str, DTYPES))}"
    return (False, MISSING) if MISSING else (True, f"C++ operators, {INSTRUCTION_SET}")


def element_dtype(dtype: torch.dtype, embed_dim: int, num_heads: int) -> torch.dtype:
    """What the products run in. bfloat16 dot products take pairs, and so an even head width."""
    native = dtype == torch.bfloat16 and embed_dim // num_heads % 2 == 0 and HAS_BFLOAT16
    return torch.bfloat16 if native else torch.float32


@dataclass
class Kept:
    """What the forward pass leaves for the backward pass: all, the rows without the weights, or nothing.

    What RADA_SAVE_BYTES (default 512 MiB) has no room for is empty, and is computed again.
    """

    rational: Tensor  # [B, K, D] rational queries
    key: Tensor  # [B, K, D]
    value: Tensor  # [B, K, D]
    attended: Tensor  # [B, K, D]
    change: Tensor  # [B, K, D] M - 1
    statistics: Tensor  # [2, B·H, 2] text and rational kind: the reference q·k, the sum of exponentials against it
    weights: Tensor  # [2, B·H, K, K rounded up to SCORE_COLUMNS] exponentials e^(score - reference of their block)
    weight_scale: Tensor  # [2, B·H, K / SCORE_ROWS rounded up]: from the block's reference to the pair's

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())


def empty_kept(image: Tensor, text: Tensor, options: Options, save: bool) -> Kept:
    """Uninitialised tensors for what a call keeps, from shapes alone: first the rows, then the weights."""
    (batch, width), classes, heads = image.shape, text.shape[0], options.num_heads
    element = element_dtype(image.dtype, width, heads)
    rational = "rational" in options.queries
    columns = -(-classes // SCORE_COLUMNS) * SCORE_COLUMNS
    blocks = -(-classes // SCORE_ROWS)
    rows = weights = False
    if save:
        room = budget("RADA_SAVE_BYTES", SAVE_BYTES)
        row_bytes = batch * classes * width * ((3 + rational) * element.itemsize + 4)
        rows = row_bytes <= room
        weights = row_bytes + 2 * batch * heads * classes * columns * 4 <= room

    def empty(keep, *shape, dtype=torch.float32):
        return image.new_empty(shape if keep else 0, dtype=dtype)

    row_shape = (batch, classes, width)
    return Kept(
        rational=empty(rows and rational, *row_shape, dtype=element),
        key=empty(rows, *row_shape, dtype=element),
        value=empty(rows, *row_shape, dtype=element),
        attended=empty(rows, *row_shape, dtype=element),
        change=empty(rows, *row_shape),
        statistics=empty(rows, 2, batch * heads, 2),
        weights=empty(weights, 2, batch * heads, classes, columns),
        weight_scale=empty(weights, 2, batch * heads, blocks),
    )


class Call:
    """One call's arguments as the library takes them."""

    def __init__(self, image: Tensor, text: Tensor, params: Params, options: Options):
        width = image.shape[1]
        self.options = options
        self.element = element_dtype(image.dtype, width, options.num_heads)
        self.inverse = (inverse_norms(image), inverse_norms(text)) if options.normalize else None
        self.f, self.h = image.float(), text.float()
        if self.inverse:
            self.f, self.h = self.f * self.inverse[0].unsqueeze(-1), self.h * self.inverse[1].unsqueeze(-1)
        self.f, self.h = self.f.contiguous(), self.h.contiguous()
        self.scale = params.logit_scale.item()
        self.root = params.logit_scale.float().sqrt()
        self.params = params
        empty = self.f.new_empty(0)
        self.image_query = self.text_query = empty
        if "image" in options.queries:
            self.image_query = self._query(self.f, "query_image").float()
        if "text" in options.queries:
            self.text_query = self._query(self.h, "query_text").to(self.element)
        names = ("query_rational", "key", "value", "out")
        self.layers = []
        for name in names:
            self.layers += [self.weight(name).contiguous(), self.bias(name).float().contiguous()]

    def weight(self, name: str) -> Tensor:  # [D, D]
        return getattr(self.params, f"{name}_weight").to(self.element)

    def bias(self, name: str) -> Tensor:  # [D]
        return getattr(self.params, f"{name}_bias").to(self.element)

    def _query(self, rows: Tensor, name: str) -> Tensor:
        """W (√s rows) + c, [N, D]."""
        return torch.addmm(self.bias(name), (self.root * rows).to(self.element), self.weight(name).t())

    def arguments(self, kept: list[Tensor]) -> tuple:
        options = self.options
        return (
            self.f, self.h, self.image_query, self.text_query, self.layers, kept,
            options.num_heads, self.scale, options.score_factor(self.f.shape[1]), "rational" in options.queries,
            PENALTIES.index(options.penalty), budget("RADA_TILE_BYTES", SCORE_BYTES),
        )  # fmt: skip


def forward(
    image: Tensor, text: Tensor, params: Params, options: Options, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Masked sums [B, K], each image's statistic of |M - 1| [B], and what the backward pass starts from."""
    kept = empty_kept(image, text, options, save).tensors()
    sums = image.new_empty(len(image), len(text), dtype=torch.float32)
    deviation = image.new_empty(len(image), dtype=torch.float32)
    if len(image):
        torch.ops.rada_cpu.forward(*Call(image, text, params, options).arguments(kept), sums, deviation)
    return sums, deviation, kept


def backward(
    grad_sums: Tensor,  # [B, K]
    grad_deviation: Tensor | None,  # [B]
    image: Tensor,
    text: Tensor,
    params: Params,
    kept: list[Tensor],
    options: Options,
    wanted: Wanted,
) -> list[Tensor]:
    """The gradients that are wanted, in this order: image, text, the twelve layer tensors."""
    call = Call(image, text, params, options)
    width = image.shape[1]
    want_features = wanted.image or wanted.text

    def zeros(wanted: bool, *shape: int) -> Tensor:
        return call.f.new_zeros(shape if wanted else 0)

    layers = [zeros(wanted.layers, *shape) for _ in range(4) for shape in ((width, width), (width,))]
    image_query, text_query = torch.zeros_like(call.image_query), torch.zeros_like(call.text_query, dtype=torch.float32)
    grad_f, grad_h = zeros(want_features, *image.shape), zeros(want_features, *text.shape)
    if len(image):
        deviation = call.f.new_empty(0) if grad_deviation is None else grad_deviation.float().contiguous()
        torch.ops.rada_cpu.backward(
            *call.arguments(kept), grad_sums.float().contiguous(), deviation, layers, image_query, text_query,
            grad_f, grad_h,
        )  # fmt: skip
    grads = []
    query_layers = []
    for index, (name, rows, grad, grad_rows, want_rows) in enumerate(
        (
            ("query_image", call.f, image_query, grad_f, wanted.image),
            ("query_text", call.h, text_query, grad_h, wanted.text),
        )
    ):
        if wanted.layers:
            query_layers += _layer_gradients(grad, call.root * rows, call.element)
        if want_rows:
            if grad.numel():
                grad_rows += call.root * (grad.to(call.element) @ call.weight(name))
            grads.append(unit_rows_backward(grad_rows, rows, call.inverse[index]) if call.inverse else grad_rows)
    if wanted.layers:
        grads += query_layers + layers
    return [grad.to(image.dtype) for grad in grads]


def _layer_gradients(grad: Tensor, rows: Tensor, element: torch.dtype) -> tuple[Tensor, Tensor]:
    """A layer's gradients, weight [D, D] and bias [D], from those of its result [N, D] and its input [N, D]."""
    if not grad.numel():  # a query kind that is not in use
        return rows.new_zeros(rows.shape[1], rows.shape[1]), rows.new_zeros(rows.shape[1])
    return grad.to(element).t() @ rows.to(element), grad.sum(0)
