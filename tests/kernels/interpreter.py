"""Triton's interpreter, mended where it computes bfloat16 wrongly: it keeps bfloat16 as the bits of uint16.

Its products and sums multiply and add those bits, and its rounding from float32 cuts off. Here every bfloat16
operation goes through float32 and rounds to nearest even, as the hardware does. It has no inline assembly; ptx.py runs
that. Nor does it patch the language anew at every call of a jit function within a kernel, which takes 40% of its time:
once for a kernel is enough.
"""

from __future__ import annotations

import types

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, interpreter_builder

from tests.kernels import ptx


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

    def inline_assembly(self, assembly, constraints, handles, results, is_pure, pack):
        (result,) = results
        numbers = [np.broadcast_to(handle.data, handles[0].data.shape) for handle in handles]
        found = ptx.elementwise(assembly, constraints, numbers, result.scalar.primitive_bitwidth // 8, pack)
        found = found.view(np.float32) if result.scalar == tl.float32 else found
        return types.SimpleNamespace(get_result=lambda index: TensorHandle(found, result.scalar))

    # What jit functions see of the language: kernels `tl`, Triton's own functions `core`.
    everywhere, patch = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}), interpreter._patch_lang
    interpreter._patch_lang = lambda function: patch(everywhere)
    InterpretedFunction.__call__ = lambda self, *args, **named: self.rewrite()(*args, **named)
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, lambda self, source, dtype: cast(self, source, dtype))
    InterpreterBuilder.create_fp_to_fp = lambda self, source, dtype, rounding: cast(self, source, dtype)
    InterpreterBuilder.create_fmul = multiply
    InterpreterBuilder.create_inline_asm = inline_assembly
    allowed = (*interpreter_builder.options.allowed_dot_input_precisions, "bf16x3")  # AMD's
    object.__setattr__(interpreter_builder.options, "allowed_dot_input_precisions", allowed)


def to_tf32(values: np.ndarray, rounding: str) -> np.ndarray:
    """float32 with TF32's 10 bits of mantissa.

    "truncated": what tensor cores do with a float32's low bits, and what the kernels mean, as Triton leaves the
    rounding to them. "nearest": as cvt.rna.tf32 rounds, ties away from zero.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    finite = (bits & 0x7F800000) != 0x7F800000
    raised = bits + np.uint32(0x1000) if rounding == "nearest" else bits
    return np.where(finite, raised & np.uint32(0xFFFFE000), bits).view(np.float32)


def rounded_product(left: np.ndarray, right: np.ndarray, precision: str, rounding: str) -> np.ndarray:
    """A float32 product as tensor cores form it. "TF32"; "BF16x3": three products of the two leading bfloat16 parts."""
    if precision == "TF32":
        return to_tf32(left, rounding) @ to_tf32(right, rounding)
    (a, b), (c, d) = map(_two_parts, (left, right))
    return (a @ d + b @ c) + a @ c


def _two_parts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    leading = to_float32(to_bfloat16(values))
    return leading, to_float32(to_bfloat16(values - leading))


class RoundedProducts(TorchDispatchMode):
    """Within it torch's float32 products, and those of kernels that ask for it, are rounded as tensor cores do."""

    def __init__(self, precision: str, rounding: str = "truncated"):
        super().__init__()
        self.how = precision, rounding
        self.asked: list[str] = []  # input_precision of the kernels' float32 products

    def __enter__(self):
        self.plain_dot = plain_dot = InterpreterBuilder.create_dot

        def dot(builder, a, b, d, input_precision, *rest):
            if a.dtype.scalar != tl.float32:
                return plain_dot(builder, a, b, d, input_precision, *rest)
            self.asked.append(input_precision.name)
            if input_precision.name != self.how[0]:
                return plain_dot(builder, a, b, d, input_precision, *rest)
            return TensorHandle(rounded_product(a.data, b.data, *self.how) + d.data, tl.float32)

        InterpreterBuilder.create_dot = dot
        return super().__enter__()

    def __exit__(self, *raised):
        InterpreterBuilder.create_dot = self.plain_dot
        return super().__exit__(*raised)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(rounded_product(left.detach().numpy(), right.detach().numpy(), *self.how))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        at = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}.get(name)
        if at is None or args[at].dtype != torch.float32:
            return function(*args, **kwargs)
        assert not kwargs, "beta and alpha are not taken into account"
        product = self.product(args[at], args[at + 1])
        if at == 0:
            return product
        return args[0].add_(product) if name.endswith("_") else args[0] + product
