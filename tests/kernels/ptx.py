"""The few PTX instructions that the kernels' inline assembly has, on NumPy arrays bit by bit.

A register is an array of uint32, a pair of them where it has 64 bits. Multiply-adds are rounded once but for the last
bit of what float64 cannot hold. NaN is 0x7FFFFFFF.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

Register = np.ndarray | tuple[np.ndarray, np.ndarray]


def floats(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


def bits_of(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), bits)


def _exp2(x: np.ndarray) -> np.ndarray:
    result = np.exp2(floats(x).astype(np.float64)).astype(np.float32)
    return bits_of(np.where(np.abs(result) < 2.0**-126, np.float32(0), result))  # flushed to zero


def _pairs(function: Callable) -> Callable:
    def of_each(*operands):
        return tuple(bits_of(function(*(floats(o[half]).astype(np.float64) for o in operands))) for half in (0, 1))

    return of_each


def _min_relu(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(np.minimum(a.view(np.int32), b.view(np.int32)), 0).view(np.uint32)


def _two_bfloat16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    high, low = (torch.from_numpy(floats(x).copy()).bfloat16().view(torch.int16).numpy() for x in (high, low))
    return high.view(np.uint16).astype(np.uint32) << 16 | low.view(np.uint16)


INSTRUCTIONS: dict[str, Callable] = {
    "ex2.approx.ftz.f32": _exp2,
    "add.rn.f32x2": _pairs(lambda a, b: a + b),
    "fma.rn.f32x2": _pairs(lambda a, b, c: a * b + c),
    "sub.s32": lambda a, b: a - b,
    "add.s32": lambda a, b: a + b,
    "shl.b32": lambda a, b: a << b,
    "min.relu.s32": _min_relu,
    "cvt.rn.bf16x2.f32": _two_bfloat16,
    "mov.b64": lambda a: a,
}


def run(assembly: str, inputs: Sequence[np.ndarray], outputs: int) -> list[np.ndarray]:
    """The outputs $0, $1 and so on, where the inputs are what follows these."""
    values: dict[str, Register] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def read(operand: str) -> Register:
        if operand.startswith("{"):
            low, high = (values[name] for name in re.findall(r"[$%]\w+", operand))
            return low, high  # type: ignore[return-value]
        if operand in values:
            return values[operand]
        number = int(operand, 0)
        words = [np.full_like(inputs[0], part) for part in (number & 0xFFFFFFFF, number >> 32)]
        return (words[0], words[1]) if len(operand) > 10 else words[0]

    for statement in assembly.strip().removeprefix("{\n").removesuffix("}").replace("\n", " ").split(";"):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        name, operands = statement.strip().split(" ", 1)
        target, *sources = re.findall(r"\{[^}]*\}|[^\s,]+", operands)
        with np.errstate(all="ignore"):
            result = INSTRUCTIONS[name](*map(read, sources))
        if target.startswith("{"):
            values.update(zip(re.findall(r"[$%]\w+", target), result, strict=True))
        else:
            values[target] = result
    return [values[f"${i}"] for i in range(outputs)]  # type: ignore[misc]


def elementwise(assembly: str, constraints: str, tensors: Sequence[np.ndarray], itemsize: int, pack: int) -> np.ndarray:
    """tl.inline_asm_elementwise of float32 tensors: bits of the one result, whose elements have so many bytes."""
    outputs = constraints.count("=")
    inputs = [np.ascontiguousarray(part) for t in tensors for part in bits_of(t).reshape(-1, pack).T]
    results = np.stack(run(assembly, inputs, outputs), 1)
    return np.ascontiguousarray(results).view(f"uint{8 * itemsize}").reshape(tensors[0].shape)
