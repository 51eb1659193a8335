"""What a program of NVIDIA machine code executes: instructions by the unit they keep busy, per run of each loop.

nvdisasm's listing is cut at labels and branches. Of all ways through a kernel from its start to its end, the one with
the most products counts, of several such ways the one with the most exponentials (a block that is peeled off a loop
stands behind a guard), and of these the shortest: masks that only the last block needs, and the rare arm of a kernel
whose programs differ, stay out. A block that asks for products of tensor memory is executed by one warp.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Copied:
    """Bytes of one UTMALDG and of one UTMASTG, which do not stand in the code."""

    load: float = 0.0
    store: float = 0.0


NOTHING_COPIED = Copied()
PRODUCT = re.compile(r"(HGMMA|HMMA)\.(\d+)(?:x(\d+)x(\d+))?|(UTC\w*MMA)")
SHARED, GLOBAL = re.compile(r"(LDS|STS|LDSM|STSM)\b"), re.compile(r"(LDGSTS|STG|REDG?|ATOMG?)\b")
MATRIX_SHAPES = {"1688": 2 * 16 * 8 * 8, "16816": 2 * 16 * 8 * 16, "1684": 2 * 16 * 8 * 4}  # FLOP of a warp's HMMA


@dataclass(frozen=True)
class Counts:
    """Of one warp. flop: of its products, of which mma_flop on the warp's own registers (mma.sync) and half_flop with
    64 rows of tensor memory's 128 lanes; special: base-2 exponentials and the like; other: instructions that are
    neither; bytes: over its 32 lanes. global_bytes are those of asynchronous copies and stores; other loads are left
    to L1.
    """

    flop: float = 0.0
    mma_flop: float = 0.0
    half_flop: float = 0.0
    special: float = 0.0
    other: float = 0.0
    shared_bytes: float = 0.0
    global_bytes: float = 0.0

    def __add__(self, more: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(self)))

    def times(self, factor: float) -> Counts:
        return Counts(*(factor * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Way:
    """What stands outside of loops, in loops around those that hold products, in the innermost of these, and in loops
    that hold no product: once each. arms: all of the innermost that the way leaves out.
    """

    straight: Counts = Counts()
    outer: Counts = Counts()
    inner: Counts = Counts()
    plain: Counts = Counts()
    arms: Counts = Counts()

    def executed(self, flop: float, passes: float, rounds: float = 1, tiles: float = 0) -> Counts:
        """A warp's counts where its share of the products is so many FLOP, outer loops run `passes` times, those
        without a product `rounds` times, and the arms `tiles` times.
        """
        around = self.straight + self.outer.times(passes) + self.plain.times(rounds) + self.arms.times(tiles)
        if not self.inner.flop:  # unrolled: the code is the work
            return around
        # The last run of a pipelined loop has no next block to multiply and copy, but all the rest to do.
        runs = max(0.0, flop - around.flop) / self.inner.flop
        whole = self.inner.times(math.ceil(runs - 1e-6))
        guarded = {name: runs * getattr(self.inner, name) for name in ("flop", "mma_flop", "half_flop", "global_bytes")}
        return around + replace(whole, **guarded)


def _tcgen05(descriptor: int) -> Counts:
    """A program's product by its instruction descriptor (PTX, kinds f16 and tf32): 32 bytes deep; bit 8 says tf32."""
    rows, columns = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
    flop = 2 * rows * columns * (8 if descriptor >> 8 & 1 else 16)
    return Counts(flop=flop, half_flop=flop if rows == 64 else 0)


@dataclass(frozen=True)
class _Instruction:
    name: str  # with its modifiers
    guarded: bool
    target: str  # of a branch
    descriptor: int = 0  # of a UTC*MMA


def _instructions(listing: str) -> tuple[list[_Instruction], dict[str, int]]:
    found, labels = [], {}
    constants: dict[str, int] = {}  # of uniform registers
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            guard, name, operands = code.groups()
            if constant := re.match(r"\s*(UR\d+), (0x[0-9a-f]+)", operands) if name == "UMOV" else None:
                constants[constant[1]] = int(constant[2], 16)
            target = re.search(r"`\((\.L_\w+)\)", operands)
            guarded = bool(guard) or bool(re.match(r"\s*!?U?P\d", operands))
            descriptor = re.search(r"idesc\[(UR\d+)\]", operands)
            described = constants[descriptor[1]] if descriptor else 0
            found.append(_Instruction(name, guarded, target[1] if target else "", described))
    return found, labels


def _bytes(name: str) -> int:
    """Of one lane."""
    if name.startswith(("LDSM", "STSM")):
        return 4 * int(name[-1]) if name[-1] in "24" else 4
    for width, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if width in name.split("."):
            return size
    return 4


def _count(code: _Instruction, copied: Copied, warps: int) -> Counts:
    name, product = code.name, PRODUCT.match(code.name)
    if product:
        kind, rows, columns, depth, tcgen05 = product.groups()
        if tcgen05:  # one thread asks for a whole program's product
            return _tcgen05(code.descriptor).times(1 / warps)
        if kind == "HGMMA":  # four warps do it together
            return Counts(flop=2 * int(rows) * int(columns) * int(depth) / 4)
        flop = MATRIX_SHAPES[rows]
        return Counts(flop=flop, mma_flop=flop)
    if name.startswith("MUFU"):
        return Counts(special=1)
    if name.startswith(("UTMALDG", "UTMASTG")):  # one thread asks for a whole program's copy
        moved = copied.load if name.startswith("UTMALDG") else copied.store
        return Counts(other=1, global_bytes=moved / warps)
    shared, moved = SHARED.match(name), GLOBAL.match(name)
    # A narrow access takes its 32 lanes a whole clock of shared memory, as 4 bytes do.
    return Counts(
        other=1,
        shared_bytes=32 * max(4, _bytes(name)) if shared else 0,
        global_bytes=32 * _bytes(name) if moved else 0,
    )


@dataclass(frozen=True)
class _Block:
    counts: Counts
    exponentials: int
    length: int
    after: tuple[int, ...]  # blocks
    ends: bool  # the program may end here


def _blocks(listing: str, warps: int, copied: Copied) -> list[_Block]:
    code, labels = _instructions(listing)
    leaves = {at for at, i in enumerate(code) if i.name.startswith(("BRA", "EXIT", "RET"))}
    starts = [at for at in sorted({0, *labels.values(), *(at + 1 for at in leaves)}) if at < len(code)]
    number = {start: block for block, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        last, after = code[end - 1], []
        if (last.guarded or end - 1 not in leaves) and end in number:
            after.append(number[end])
        if last.name.startswith("BRA") and labels.get(last.target) in number:
            after.append(number[labels[last.target]])
        counts = sum((_count(i, copied, warps) for i in code[start:end]), Counts())
        if counts.flop and any(i.descriptor for i in code[start:end]):  # of one warp alone, as its products are
            counts = replace(counts, other=counts.other / warps)
        exponentials = sum(i.name.startswith("MUFU.EX2") for i in code[start:end])
        blocks.append(_Block(counts, exponentials, end - start, tuple(after), last.name.startswith("EXIT")))
    return blocks


def _loops(blocks: list[_Block]) -> list[set[int]]:
    """Natural loops: a branch back to a block that every way to the branch has passed, and what lies between."""
    everything = set(range(len(blocks)))
    before = {b: [a for a in everything if b in blocks[a].after] for b in everything}
    dominators = {b: {0} if b == 0 else everything for b in everything}
    changed = True
    while changed:
        changed = False
        for b in range(1, len(blocks)):
            passed = {b} | (set.intersection(*(dominators[a] for a in before[b])) if before[b] else set())
            changed |= passed != dominators[b]
            dominators[b] = passed
    loops: dict[int, set[int]] = {}
    for tail, head in ((a, b) for a in everything for b in blocks[a].after if b in dominators[a]):
        body, open_ends = loops.setdefault(head, {head}), [tail]
        while open_ends:
            block = open_ends.pop()
            if block not in body:
                body.add(block)
                open_ends += before[block]
    return list(loops.values())


def read_way(listing: str, warps: int, copied: Copied = NOTHING_COPIED) -> Way:
    """From nvdisasm's listing of a kernel of so many warps. copied: by its tensor copies."""
    blocks = _blocks(listing, warps, copied)
    everywhere = _loops(blocks)
    loops = [loop for loop in everywhere if any(blocks[b].counts.flop for b in loop)]
    # From the last block to the first, branches back left out: the best way to an end, and the block it goes on to.
    best: dict[int, tuple[float, int, int]] = {}  # products, exponentials, length
    goes_on: dict[int, int | None] = {}
    for at in reversed(range(len(blocks))):
        after = max((b for b in blocks[at].after if b > at and b in best), key=best.__getitem__, default=None)
        if after is not None or blocks[at].ends:
            flop, special, length = (0.0, 0, 0) if after is None else best[after]
            counts = blocks[at].counts
            best[at] = flop + counts.flop, special + blocks[at].exponentials, length - blocks[at].length
            goes_on[at] = after

    parts, at = {part: Counts() for part in ("straight", "outer", "inner", "plain")}, 0 if blocks else None
    taken: set[int] = set()
    run: set[int] = set()  # the innermost loops that it goes through
    while at is not None:
        taken.add(at)
        tightest = min((loop for loop in loops if at in loop), key=len, default=None)
        holds_one = tightest and any(loop < tightest for loop in loops)
        part = "outer" if holds_one else "inner" if tightest else "straight"
        if not tightest and any(at in loop for loop in everywhere):
            part = "plain"
        if part == "inner" and tightest:
            run |= tightest
        parts[part] = parts[part] + blocks[at].counts
        at = goes_on[at]
    return Way(**parts, arms=sum((blocks[b].counts for b in run - taken), Counts()))
