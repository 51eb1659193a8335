"""Tensor descriptors of a head's columns: what the tensor memory accelerator (sm_90, sm_100) copies blocks by."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rada_kernels.triton_common.call import Shapes
from rada_kernels.triton_common.dialect import pieces

Blocks = tuple[TensorDescriptor, ...]


def head_blocks(rows: Tensor, block: int, shapes: Shapes) -> Blocks:
    """Of rows [planes, K, D], for blocks of so many classes: a descriptor [planes, K, H, E] by piece of a head."""
    by_head = rows.unflatten(-1, (shapes.H, shapes.E))
    return tuple(TensorDescriptor.from_tensor(by_head, [1, block, 1, width]) for width in pieces(shapes.E))
