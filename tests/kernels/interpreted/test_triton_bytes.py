"""Bytes and FLOP, counted where the interpreted kernels load, store and multiply, against those from the shapes."""

from __future__ import annotations

import pytest
import torch
from codegen.prediction import work_of

from rada_kernels import Params
from rada_kernels.backends import triton as backend
from tests.kernels.interpreted.accesses import Recorded
from tests.kernels.truth import make_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "classes"), [(8, 10), (4, 40), (2, 130)], ids=["few classes", "one row tile", "several row tiles"]
)
def test_bytes_of_a_forward_pass(batch, classes, dtype, monkeypatch):
    case = make_case(batch, classes, 64, 2).cast(dtype)
    params = Params(*case.layers, logit_scale=case.scale.float())
    with monkeypatch.context() as patch:
        traffic = Recorded(patch)
        saved = backend.forward(case.image, case.text, params, case.options, True, traffic)[2]
    # A launch passes over a tensor once: what a program stores and reads back, as O, is read from L2.
    counted = sum(seen.bytes_of("load", "store", "atomic") for seen in traffic.launches)
    by_formula = sum(seen.launch.bytes for seen in traffic.launches)
    assert len(traffic.launches) == 3
    assert counted == pytest.approx(by_formula, rel=0.03)

    # The least: weights, features, logits and O once, one write and one read of what is passed between launches.
    projected, attended = backend.Saved.of(saved, tile=0)
    inputs = [case.image, case.text, *params.layers]  # the query projections' weights too
    between = [projected.projections, projected.query_image, projected.query_text, attended.image_row]
    # With one row tile the attention hands over O, and the kinds' rows are for the backward pass alone.
    once, twice = (attended.rows, attended.combined) if classes < 64 else (attended.combined, attended.rows)
    between.append(twice)
    least = sum(t.numel() * t.element_size() for t in [*inputs, once]) + 4 * batch * classes
    least += 2 * sum(t.numel() * t.element_size() for t in between)
    print(f"counted {counted}, formula {by_formula}, least {least}: {counted / least:.3f}")
    assert counted <= 1.25 * least
    wide = [t for t in saved if t.dtype == torch.float32 and t.numel() >= batch * classes * 64]
    assert dtype == torch.float32 or not wide, "a float32 [B, K, D]"


@pytest.mark.parametrize(
    ("batch", "classes", "head_width"),
    [(3, 10, 48), (2, 70, 48), (1, 130, 48), (1, 20, 144)],
    ids=["few classes", "one row tile", "several row tiles", "padded head"],
)
def test_products_of_a_step(batch, classes, head_width, monkeypatch):
    """The model's FLOP, padding included, are what the kernels multiply: every launch, forward and backward."""
    case = make_case(batch, classes, 2 * head_width, 2).cast(torch.float32)
    params = Params(*case.layers, logit_scale=case.scale.float())
    with monkeypatch.context() as patch:
        traffic = Recorded(patch)
        call = case.image, case.text, params
        sums, deviation, saved = backend.forward(*call, case.options, True, traffic)
        wanted = backend.Wanted(True, True, True)
        backend.backward(sums, deviation, *call, saved, case.options, wanted, traffic)
    counted = {seen.launch.name: seen.flop for seen in traffic.launches}
    assert sum(map(bool, counted.values())) >= 6
    for seen in traffic.launches:
        assert seen.flop == work_of(seen.launch)[0], seen.launch.name
