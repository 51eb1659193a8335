"""A quick part of bench/compile_report.py: the forward kernels' machine code on three architectures, without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from compile_report import ARCHITECTURES, Compiler, record_launches
from workloads import WORKLOADS

from rada_kernels.launch import Device


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["eurosat", "caltech101"])
def test_forward_kernels(arch, name):
    """No spills, tensor cores wherever there is a product, shared memory within the limit, two programs."""
    compiler, device = Compiler(arch), Device.named(arch)
    launches = record_launches(WORKLOADS[name], "forward", torch.bfloat16, device)
    assert len(launches) == 3
    for launch in launches:
        code = compiler.code(launch)
        assert code.spill_bytes == 0, launch.name
        assert code.products == 0 or code.tensor_core, launch.name
        assert code.products > 0, launch.name
        assert code.shared_bytes <= device.shared_bytes, launch.name
        assert code.wide_accesses > 0, launch.name
        assert code.resident(ARCHITECTURES[arch], arch, launch.arguments["num_warps"]) >= 2, launch.name
