"""The devices that the Triton kernels run on, as far as launch configurations depend on them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

KIB = 1024


@dataclass(frozen=True)
class Device:
    """name: such as "sm_90", "gfx90a", "interpreter". shared_bytes: shared memory that a program may use.
    multiprocessors: or compute units.
    """

    name: str
    shared_bytes: int
    multiprocessors: int = 132

    @property
    def family(self) -> str:
        """How matrix products take their operands, which is what launch configurations follow.

        "wgmma": from shared memory (sm_9x to sm_11x: wgmma, tcgen05). "mma": from each warp's registers (the other
        NVIDIA devices). "cdna": AMD with 64 lanes (gfx9: mfma). "rdna": AMD with 32 lanes and at most 256 registers
        a thread, whose WMMA duplicates operands across half-waves.
        """
        if self.name == "interpreter":
            return "interpreter"
        if self.name.startswith("gfx"):
            return "cdna" if self.name.startswith("gfx9") else "rdna"
        return "wgmma" if int(self.name.removeprefix("sm_")) // 10 in (9, 10, 11) else "mma"

    @property
    def tensor_memory(self) -> bool:
        """Whether products accumulate in a memory of their own (tcgen05: sm_10x, sm_11x), not in registers."""
        return self.family == "wgmma" and not self.name.startswith("sm_9")

    @property
    def descriptors(self) -> bool:
        """Whether kernels take tensor descriptors in tuples: Triton's launcher does from 3.8 on."""
        import triton

        return self.family == "wgmma" and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)

    def precision(self, dtype: torch.dtype, matmul_precision: str) -> str:
        """input_precision of tl.dot. float32 follows torch.get_float32_matmul_precision().

        "highest": float32 multiply-adds. "high" and "medium": TF32 on NVIDIA; on AMD, whose compiler has no TF32,
        three products of bfloat16 halves, the other reading that torch gives "high".
        """
        if dtype != torch.float32 or matmul_precision == "highest":
            return "ieee"
        return "bf16x3" if self.family in ("cdna", "rdna") else "tf32"


INTERPRETER = Device("interpreter", 227 * KIB)


@functools.lru_cache
def gpu(index: int) -> Device:
    """The CUDA or ROCm device of that index."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:  # its properties have no shared_memory_per_block_optin: what a program has, it may use
        name, shared_bytes = properties.gcnArchName.split(":")[0], properties.shared_memory_per_block
    else:
        name = f"sm_{properties.major}{properties.minor}"
        shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device(name, shared_bytes, properties.multi_processor_count)
