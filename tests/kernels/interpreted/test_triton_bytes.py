"""Bytes and FLOP, counted where the interpreted kernels load, store and multiply, against those from the shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codegen.launches import Launch
from codegen.prediction import work_of
from triton.runtime.interpreter import InterpreterBuilder

from rada_kernels import Params
from rada_kernels.backends import triton as backend
from rada_kernels.triton_common.device import INTERPRETER
from rada_kernels.triton_common.target import Target
from tests.kernels.truth import make_case


class Traffic(Target):
    """For each launch: distinct bytes loaded and stored, FLOP of the products."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__(INTERPRETER)
        self.launches: list[tuple[Launch, int, int]] = []
        dot, load, store, atomic = (
            InterpreterBuilder.create_dot,
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
            InterpreterBuilder.create_atomic_rmw,
        )

        def note(kind, pointers, mask, width):
            addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
            addresses = np.unique(addresses[np.broadcast_to(mask.data, addresses.shape)])
            self.seen[kind].append(addresses)
            self.widths.update(dict.fromkeys(addresses.tolist(), width))

        def masked_load(builder, pointers, mask, *rest, **named):
            note("load", pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)
            return load(builder, pointers, mask, *rest, **named)

        def masked_store(builder, pointers, value, mask, *rest, **named):
            note("store", pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)
            return store(builder, pointers, value, mask, *rest, **named)

        def counted_atomic(builder, operation, pointers, value, mask, *rest):
            note("store", pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)
            return atomic(builder, operation, pointers, value, mask, *rest)

        def counted_dot(builder, a, b, *rest):
            self.flop += 2 * a.data.size * b.data.shape[-1]
            return dot(builder, a, b, *rest)

        patch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", counted_atomic)
        patch.setattr(InterpreterBuilder, "create_dot", counted_dot)

    def run(self, kernel, grid, arguments):
        self.seen, self.widths, self.flop = {"load": [], "store": []}, {}, 0
        super().run(kernel, grid, arguments)
        distinct = 0
        for addresses in self.seen.values():
            if addresses:
                distinct += sum(map(self.widths.get, np.unique(np.concatenate(addresses)).tolist()))
        self.launches.append((Launch(kernel.fn, grid, arguments), distinct, self.flop))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "classes"), [(8, 10), (4, 40), (2, 130)], ids=["few classes", "one row tile", "several row tiles"]
)
def test_bytes_of_a_forward_pass(batch, classes, dtype, monkeypatch):
    case = make_case(batch, classes, 64, 2).cast(dtype)
    params = Params(*case.layers, logit_scale=case.scale.float())
    with monkeypatch.context() as patch:
        traffic = Traffic(patch)
        saved = backend.forward(case.image, case.text, params, case.options, True, traffic)[2]
    counted = sum(distinct for _, distinct, _ in traffic.launches)
    by_formula = sum(launch.bytes for launch, _, _ in traffic.launches)
    assert len(traffic.launches) == 3
    assert counted == pytest.approx(by_formula, rel=0.03)

    # The least: weights, features and logits once, one write and one read of what is passed between launches.
    projected, attended, rows = backend.Saved.of(saved, tile=0)
    inputs = [case.image, case.text, *params.layers]  # the query projections' weights too
    between = [
        projected.projections,
        projected.query_image,
        projected.query_text,
        attended.rows,
        attended.image_row,
        rows,
    ]
    least = sum(t.numel() * t.element_size() for t in inputs) + 4 * batch * classes
    least += 2 * sum(t.numel() * t.element_size() for t in between)
    print(f"counted {counted}, formula {by_formula}, least {least}: {counted / least:.3f}")
    assert counted <= 1.25 * least
    wide = [t for t in saved if t.dtype == torch.float32 and t.numel() >= batch * classes * 64]
    assert dtype == torch.float32 or not wide, "a float32 [B, K, D]"


@pytest.mark.parametrize(
    ("batch", "classes"), [(3, 10), (2, 70), (1, 130)], ids=["few classes", "one row tile", "several row tiles"]
)
def test_products_of_a_step(batch, classes, monkeypatch):
    """The model's FLOP, padding included, are what the kernels multiply: every launch, forward and backward."""
    case = make_case(batch, classes, 96, 2).cast(torch.float32)
    params = Params(*case.layers, logit_scale=case.scale.float())
    with monkeypatch.context() as patch:
        traffic = Traffic(patch)
        call = case.image, case.text, params
        sums, deviation, saved = backend.forward(*call, case.options, True, traffic)
        wanted = backend.Wanted(True, True, True)
        backend.backward(sums, deviation, *call, saved, case.options, wanted, traffic)
    counted = {launch.name: flop for launch, _, flop in traffic.launches}
    assert sum(map(bool, counted.values())) >= 6
    for launch, _, flop in traffic.launches:
        assert flop == work_of(launch)[0], launch.name
