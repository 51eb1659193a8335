"""Triton's interpreter, mended where it computes bfloat16 wrongly: it keeps bfloat16 as the bits of uint16.

Its products and sums multiply and add those bits, and its rounding from float32 cuts off. Here every bfloat16
operation goes through float32 and rounds to nearest even, as the hardware does.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(values))


def mend() -> None:
    """Replace the faulty operations of the interpreter, in this process."""
    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(to_float32(handle.data), tl.float32)

    def dot(self, a, b, d, *rest):
        return plain_dot(self, wide(a), wide(b), d, *rest)

    def cast(self, source, dtype):
        if source.dtype.scalar == tl.bfloat16 and dtype.scalar != tl.bfloat16:
            return plain_cast(self, wide(source), dtype)
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(source.data), tl.bfloat16)
        return plain_cast(self, source, dtype)

    def multiply(self, left, right):
        product = np.multiply(wide(left).data, wide(right).data)
        if left.dtype.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(product), tl.bfloat16)
        return TensorHandle(product, left.dtype.scalar)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, lambda self, source, dtype: cast(self, source, dtype))
    InterpreterBuilder.create_fp_to_fp = lambda self, source, dtype, rounding: cast(self, source, dtype)
    InterpreterBuilder.create_fmul = multiply
