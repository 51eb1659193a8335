"""exp2 on two units at a time, for devices whose exponentials limit the attention (sm_10x, sm_11x).

The special-function unit makes 16 exponentials a clock. Of every four, two go to it; two are a polynomial on the
multiply-add unit, two numbers an instruction. With n the nearest integer and r = x - n, 2^x = 2^n (1 + c1 r + c2 r² +
c3 r³). The relative error is 1.02e-4 at most, a nineteenth of 2^-9, by which bfloat16 rounds; 2^0 is exactly 1.

The polynomial is taken times 2^-120, and n + 120, held to [0, 246], is added to its exponent: below 2^-120 it is
2^-120 or so, not 0, and from 2^126 on more than 2^125. Infinite and NaN scores become NaN or less than -10^35.
"""

from __future__ import annotations

import triton
import triton.language as tl

# $0 to $3: 2^x of $4 to $7. 0x4B400000 is 1.5 · 2^23: what is added to it is rounded to an integer.
_EXP2 = tl.constexpr("""{
.reg .b64 %x, %n, %r, %p, %c;
.reg .b32 %n0, %n1, %p0, %p1;
ex2.approx.ftz.f32 $0, $4;
ex2.approx.ftz.f32 $1, $5;
mov.b64 %x, {$6, $7};
mov.b64 %c, 0x4B4000004B400000;
add.rn.f32x2 %n, %x, %c;
mov.b64 {%n0, %n1}, %n;
mov.b64 %c, 0xCB400000CB400000;
add.rn.f32x2 %n, %n, %c;
mov.b64 %c, 0xBF800000BF800000;
fma.rn.f32x2 %r, %n, %c, %x;
mov.b64 %p, 0x0161511001615110;
mov.b64 %c, 0x0278062902780629;
fma.rn.f32x2 %p, %p, %r, %c;
mov.b64 %c, 0x03317AFD03317AFD;
fma.rn.f32x2 %p, %p, %r, %c;
mov.b64 %c, 0x0380000003800000;
fma.rn.f32x2 %p, %p, %r, %c;
mov.b64 {%p0, %p1}, %p;
sub.s32 %n0, %n0, 0x4B3FFF88;
sub.s32 %n1, %n1, 0x4B3FFF88;
min.relu.s32 %n0, %n0, 246;
min.relu.s32 %n1, %n1, 246;
shl.b32 %n0, %n0, 23;
shl.b32 %n1, %n1, 23;
add.s32 $2, %n0, %p0;
add.s32 $3, %n1, %p1;
}""")


@triton.jit
def exp2_on_two_units(b_x):
    """2^x of float32, four elements of a thread at a time."""
    return tl.inline_asm_elementwise(_EXP2, "=f,=f,=f,=f,f,f,f,f", [b_x], tl.float32, True, 4)


@triton.jit
def round_after(b_x, b_before):
    """float32 [M, N] as bfloat16, not before [M] is known.

    Without this Triton puts the sum of a block's weights off to the next run of a pipelined loop, and holds them in
    registers until then: as many instructions more as there are weights.
    """
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f,f,f", [b_x, b_before[:, None]], tl.bfloat16, True, 2
    )
