"""The `cpu` backend: the whole head in C++, built at installation, see rada_kernels/csrc.

float32 runs in float32; bfloat16 on the machine's tile registers or in its dot products where it has them; float16, and
bfloat16 elsewhere, in float32 with one rounding at the end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rada_kernels import ops
from rada_kernels.budget import MIB, SAVE_BYTES, budget
from rada_kernels.options import PENALTIES, QUERIES, Options, Params, Wanted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# RADA_CPU_LIBRARY: another build of it, such as the one that `make sanitize` tests.
LIBRARY = Path(os.environ.get("RADA_CPU_LIBRARY") or Path(__file__).parent.parent / "rada_cpu.so")

# A thread's room for the scores of one image and head, unless RADA_TILE_BYTES says otherwise. Above it, from
# K = 2048 on, scores stream: a third more arithmetic with the values, and memory that grows with K instead of K².
SCORE_BYTES = 32 * MIB


def _load() -> tuple[str, str, bool, str]:
    """The instruction set in use, why there is none, whether it has bfloat16 dot products, and the sets refused."""
    if not LIBRARY.exists():
        reason = LIBRARY.with_suffix(".missing")  # setup.py leaves it
        why = reason.read_text().strip() if reason.exists() else "install again with a C++ compiler"
        return "", f"{LIBRARY.name} was not built: {why}", False, ""
    try:
        torch.ops.load_library(LIBRARY)
        library = torch.ops.rada_cpu
        found = library.instruction_set(), "", library.has_bfloat16(), library.refused_instruction_sets()
        for operator in ("forward", "backward"):  # they write into their arguments and return nothing
            torch.library.register_fake(f"rada_cpu::{operator}", lambda *arguments: None)
        return found
    except (OSError, RuntimeError) as error:
        return "", f"{LIBRARY.name} does not load: {error}", False, ""
    except AttributeError as error:
        return "", f"{LIBRARY.name} was built from another version of its sources ({error}): install again", False, ""


# Once, at import: torch.compile traces what asks for it. REFUSED: what the machine does not run, each with the reason.
INSTRUCTION_SET, MISSING, HAS_BFLOAT16, REFUSED = _load()


def usable(dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int) -> tuple[bool, str]:
    if device.type != "cpu":
        return False, f"device {device}: it takes cpu"
    if dtype not in DTYPES:
        return False, f"dtype {dtype}: it takes one of {', '.join(map(str, DTYPES))}"
    if MISSING:
        return False, MISSING
    return True, f"C++ operators, {INSTRUCTION_SET}" + (f" ({REFUSED})" if REFUSED else "")


def element_dtype(dtype: torch.dtype, embed_dim: int, num_heads: int) -> torch.dtype:
    """What the products run in. bfloat16 dot products take pairs, and so an even head width."""
    native = dtype == torch.bfloat16 and embed_dim // num_heads % 2 == 0 and HAS_BFLOAT16
    return torch.bfloat16 if native else torch.float32


@dataclass
class Saved:
    """What the forward pass leaves for the backward pass: all, or nothing where RADA_SAVE_BYTES (512 MiB) has no room.

    Scores are always computed again: that takes less time than fresh memory for what would be saved of them.
    """

    query_image: Tensor  # [B, D]
    query_text: Tensor  # [K, D]
    query_rational: Tensor  # [B, K, D]
    key: Tensor  # [B, K, D]
    value: Tensor  # [B, K, D]
    change: Tensor  # [B, K, D] M - 1
    attended: Tensor  # [B, K, D]
    shifts: Tensor  # [2, B·H] what is subtracted from q·k before it is exponentiated, text and rational kind

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())


def empty_saved(image: Tensor, text: Tensor, options: Options, save: bool) -> list[Tensor]:
    """Uninitialised tensors for what a call saves, from shapes alone."""
    (batch, width), classes, heads = image.shape, text.shape[0], options.num_heads
    element = element_dtype(image.dtype, width, heads)
    rational = "rational" in options.queries
    row_bytes = batch * classes * width * (4 + rational) * element.itemsize
    save = save and row_bytes <= budget("RADA_SAVE_BYTES", SAVE_BYTES)

    def empty(in_use, *shape, dtype=element):
        return image.new_empty(shape if save and in_use else 0, dtype=dtype)

    row_shape = (batch, classes, width)
    return Saved(
        query_image=empty("image" in options.queries, batch, width),
        query_text=empty("text" in options.queries, classes, width),
        query_rational=empty(rational, *row_shape),
        key=empty(True, *row_shape),
        value=empty(True, *row_shape),
        change=empty(True, *row_shape),
        attended=empty(True, *row_shape),
        shifts=empty(True, 2, batch * heads, dtype=torch.float32),
    ).tensors()


def operator_arguments(image: Tensor, text: Tensor, params: Params, options: Options, saved: list[Tensor]) -> tuple:
    """What both operators take first. They convert on threads of their own: torch's would be missing after a fork."""
    queries = sum(1 << QUERIES.index(name) for name in options.queries)
    return (
        image, text, params.layers, saved, options.num_heads, params.scale.item(),
        options.score_factor(image.shape[1]), options.normalize, queries, PENALTIES.index(options.penalty),
        budget("RADA_TILE_BYTES", SCORE_BYTES),
    )  # fmt: skip


def forward(
    image: Tensor, text: Tensor, params: Params, options: Options, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Masked sums [B, K], each image's deviation |M - 1| [B], and what the backward pass starts from."""
    saved = empty_saved(image, text, options, save)
    batch, classes = image.shape[0], text.shape[0]  # not len: an export leaves the batch open
    sums = image.new_empty(batch, classes, dtype=torch.float32)
    deviation = image.new_empty(batch, dtype=torch.float32)
    torch.ops.rada_cpu.forward(*operator_arguments(image, text, params, options, saved), sums, deviation)
    return sums, deviation, saved


def attended_rows(image: Tensor, text: Tensor, params: Params, options: Options) -> Tensor:
    """The attended rows O [B, K, D] in the dtype of the features."""
    (batch, width), classes = image.shape, text.shape[0]
    saved = Saved(*empty_saved(image, text, options, save=False))
    saved.attended = saved.attended.new_empty(batch, classes, width)
    nothing = saved.shifts  # neither sums nor deviation
    torch.ops.rada_cpu.forward(
        *operator_arguments(image, text, params, options, saved.tensors()), nothing, nothing.clone()
    )
    return saved.attended.to(image.dtype)


def backward(
    grad_sums: Tensor, grad_deviation: Tensor | None, image: Tensor, text: Tensor, params: Params,
    saved: list[Tensor], options: Options, wanted: Wanted,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are wanted, in this order: image, text, the twelve layer tensors."""

    def gradient(of: Tensor, wanted: bool) -> Tensor:
        return torch.empty_like(of if wanted else of.new_empty(0), memory_format=torch.contiguous_format)

    features = wanted.image or wanted.text  # both or none: they come out of the same rows
    grad_image, grad_text = gradient(image, features), gradient(text, features)
    layers = [gradient(layer, wanted.layers) for layer in params.layers]
    deviation = grad_sums.new_empty(0) if grad_deviation is None else grad_deviation
    torch.ops.rada_cpu.backward(
        *operator_arguments(image, text, params, options, saved), grad_sums, deviation, layers, grad_image, grad_text
    )
    return [grad_image] * wanted.image + [grad_text] * wanted.text + layers * wanted.layers


masked_similarity, attended_rows = ops.register("cpu", forward, backward, empty_saved, attended_rows)
