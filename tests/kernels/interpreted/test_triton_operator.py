"""The whole operator by Triton kernels, interpreted: values and gradients, by the one rule of bench/tolerance.py."""

from __future__ import annotations

import pytest
import torch

from rada_kernels import Params, rada_logits
from rada_kernels.backends import triton as backend
from rada_kernels.triton_common.device import KIB, Device
from rada_kernels.triton_common.target import Target
from tests.kernels.test_reference import SUBSETS
from tests.kernels.truth import assert_as_good_as_reference, assert_loss_scale_is_borne, make_case, results

TILES = ["few classes", "one row tile", "several row tiles"]
SHAPES = [  # (B, K, D, H)
    pytest.param(2, 1, 48, 3, id="one class, E = 16"),
    pytest.param(17, 2, 32, 2, id="rows of several images in a tile"),
    pytest.param(2, 17, 96, 2, id="E = 48, padded"),
    pytest.param(2, 32, 64, 2, id="a block of exactly K classes, the image's row in another"),
    pytest.param(2, 63, 32, 2, id="a tile of exactly K rows and the image's"),
    pytest.param(1, 64, 64, 2, id="one more"),
    pytest.param(2, 65, 96, 1, id="two tiles, E = 96"),
    pytest.param(1, 128, 64, 1, id="the image's row alone in its tile"),
    pytest.param(1, 129, 80, 1, id="E = 80"),
    pytest.param(2, 200, 32, 2, id="several row tiles"),
    pytest.param(1, 192, 96, 1, id="E = 96"),
    pytest.param(1, 140, 128, 1, id="E = 128"),
    pytest.param(2, 19, 18, 2, id="E = 9, padded to 16"),
    pytest.param(2, 40, 72, 1, id="E = 72, padded to 64 + 16"),
    pytest.param(1, 40, 144, 1, id="E = 144, padded to 128 + 32"),
    pytest.param(1, 70, 160, 1, id="E = 160"),
    pytest.param(1, 20, 192, 1, id="E = 192"),
    pytest.param(1, 40, 512, 2, id="E = 256"),
]


@pytest.mark.parametrize(("batch", "classes", "width", "heads"), SHAPES)
def test_shapes(batch, classes, width, heads, poisoned_empty):
    assert_as_good_as_reference(make_case(batch, classes, width, heads), "triton", torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "classes"), [(2, 17), (2, 70), (2, 140)], ids=TILES)
def test_16_bits(dtype, batch, classes, poisoned_empty):
    # Near ties decide which element is the largest, and with it where linf's gradient goes.
    case = make_case(batch, classes, 64, 2, clear_gates=True, penalty="mse")
    assert_as_good_as_reference(case, "triton", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "classes", "width", "heads"), SHAPES)
def test_16_bits_in_every_shape(dtype, batch, classes, width, heads, poisoned_empty):
    """Pooled: with one head the error of a query bias's gradient is that of two numbers, the images' deltas."""
    cases = [make_case(batch, classes, width, heads, clear_gates=True, penalty="l1", seed=seed) for seed in range(3)]
    assert_as_good_as_reference(cases, "triton", dtype)


@pytest.mark.parametrize("classes", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_loss_scale_is_borne_in_float16(classes):
    assert_loss_scale_is_borne("triton", classes)


@pytest.mark.parametrize("queries", [("text",), ("rational",), ("image", "rational")], ids="+".join)
def test_query_subsets_in_float16(queries, poisoned_empty):
    """One matrix query kind has no other whose unit its sums would follow."""
    case = make_case(2, 40, 32, 2, queries=queries, clear_gates=True, penalty="mse")
    assert_as_good_as_reference(case, "triton", torch.float16)


class _OnTarget(torch.autograd.Function):
    """The backend's forward and backward pass with another device's launch configurations, interpreted."""

    @staticmethod
    def forward(ctx, target, options, scale, image, text, *layers):
        call = image, text, Params(*layers, logit_scale=scale.float()), options
        sums, deviation, kept = backend.forward(*call, True, target)
        ctx.saved = target, call, kept
        return sums, deviation

    @staticmethod
    def backward(ctx, grad_sums, grad_deviation):
        target, (image, text, params, options), kept = ctx.saved
        everything = backend.Wanted(True, True, True)
        call = grad_sums, grad_deviation, image, text, params, kept, options, everything, target
        return None, None, None, *backend.backward(*call)


def on_target(target: Target):
    def logits(image, text, params, options):
        sums, deviation = _OnTarget.apply(target, options, params.logit_scale.detach(), image, text, *params.layers)
        return (params.logit_scale * sums).to(image.dtype), deviation.mean()

    return logits


@pytest.mark.parametrize(
    ("device", "dtype", "width", "classes"),
    [
        (Device("sm_80", 163 * KIB), torch.float16, 96, 70),
        (Device("sm_90", 227 * KIB), torch.float16, 64, 70),
        (Device("sm_90", 227 * KIB), torch.float32, 96, 70),
        (Device("sm_90", 227 * KIB), torch.float32, 128, 10),
        (Device("gfx1100", 64 * KIB), torch.float16, 64, 20),
        (Device("gfx1100", 64 * KIB), torch.float16, 64, 70),
        (Device("sm_90", 227 * KIB), torch.bfloat16, 144, 40),
        (Device("sm_80", 163 * KIB), torch.float16, 160, 40),
    ],
    ids=str,
)
def test_configurations_of_other_devices(device, dtype, width, classes, poisoned_empty):
    """Row tiles and class blocks of different sizes."""
    case = make_case(1, classes, width, 1, clear_gates=True, penalty="mse")
    assert_as_good_as_reference(case, on_target(Target(device)), dtype)


@pytest.mark.parametrize("classes", [11, 50, pytest.param(131, marks=pytest.mark.slow)], ids=TILES)
@pytest.mark.parametrize("queries", SUBSETS, ids="+".join)
def test_query_subsets(queries, classes, poisoned_empty):
    penalty = ("linf", "l1", "mse")[len(queries) % 3]
    case = make_case(2, classes, 32, 2, queries=queries, penalty=penalty, temperature=0.5)
    assert_as_good_as_reference(case, "triton", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [11, 50, 131], ids=TILES)
@pytest.mark.parametrize("penalty", ["linf", "l1", "mse"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_penalties_and_temperatures(penalty, temperature, classes, poisoned_empty):
    case = make_case(3, classes, 32, 2, penalty=penalty, temperature=temperature)
    assert_as_good_as_reference(case, "triton", torch.float32)


@pytest.mark.parametrize(
    ("scale", "classes"), [(1e-3, 19), (1000.0, 19), (1000.0, 70), (1e-3, 131), (200.0, 131), (1000.0, 131)]
)
def test_scales(scale, classes, poisoned_empty):
    """From a nearly uniform attention to one that a single pair of classes, in one of the row tiles, dominates."""
    assert_as_good_as_reference(make_case(2, classes, 32, 2, scale=scale), "triton", torch.float32)


@pytest.mark.parametrize("classes", [19, 70, 131], ids=TILES)
def test_frozen_features_computed_again_and_unnormalised(classes, monkeypatch, poisoned_empty):
    monkeypatch.setenv("RADA_SAVE_BYTES", "0")
    case = make_case(2, classes, 32, 2, scale=0.5, normalize=False)
    assert_as_good_as_reference(case, "triton", torch.float32, features=False)


@pytest.mark.parametrize("features", [True, False])
def test_images_in_chunks(features, monkeypatch, poisoned_empty):
    monkeypatch.setenv("RADA_SAVE_BYTES", "0")
    case = make_case(5, 19, 32, 2)
    monkeypatch.setattr(backend, "CHUNK_BYTES", 2 * 5 * 19 * 32 * 4)  # of five tensors: two images, two, and one
    assert_as_good_as_reference(case, "triton", torch.float32, features=features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [5, 50, pytest.param(130, marks=pytest.mark.slow)], ids=TILES)
def test_zero_rows_are_finite_with_zero_gradient(dtype, classes, poisoned_empty):
    case = make_case(3, classes, 32, 2)
    case.image[1] = 0
    case.text[2] = 0
    out = results(case.cast(dtype), "triton")
    for name, tensor in out.items():
        assert tensor.isfinite().all(), name
    assert not out["logits"][1].any()
    assert not out["logits"][:, 2].any()
    assert not out["grad image"][1].any()
    assert not out["grad text"][2].any()


def test_large_raw_features_in_float16():
    """The product of two raw features may exceed float16's largest number; that of two unit features cannot."""
    case = make_case(2, 5, 32, 2, scale=100.0)
    case.image, case.text = 900 * case.image, 900 * case.text
    out = results(case.cast(torch.float16), "triton")
    truth = results(case.cast(torch.float16).cast(torch.float64), "reference")
    torch.testing.assert_close(out["logits"].double(), truth["logits"], rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("classes", [7, 50, 130], ids=TILES)
def test_zero_output_layer_gives_zero_shot_logits(classes):
    case = make_case(3, classes, 32, 2, scale=100.0).cast(torch.float32)
    layers = [*case.layers[:10], torch.zeros_like(case.layers[10]), torch.zeros_like(case.layers[11])]
    params = Params(*layers, logit_scale=100.0)
    logits, penalty = rada_logits(case.image, case.text, params, case.options, "triton")
    f, h = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (case.image, case.text))
    torch.testing.assert_close(logits.double(), 100 * f @ h.t(), rtol=1e-6, atol=2e-5)
    assert penalty == 0


def test_empty_batch():
    case = make_case(2, 5, 32, 2).cast(torch.float32)
    layers = [t.requires_grad_() for t in case.layers]
    image = case.image[:0].requires_grad_()
    logits, penalty = rada_logits(image, case.text, Params(*layers, logit_scale=20.0), case.options, "triton")
    assert logits.shape == (0, 5)
    assert penalty == 0
    for grad in torch.autograd.grad(logits.sum() + penalty, [image, *layers], materialize_grads=True):
        assert not grad.any()


def test_non_contiguous_and_expanded_inputs():
    case = make_case(3, 7, 32, 2).cast(torch.float32)
    dense = results(case, "triton")
    case.image = case.image.t().contiguous().t()
    case.layers = [t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in case.layers]
    for name, tensor in results(case, "triton").items():
        assert torch.equal(tensor, dense[name]), name
    one_image = case.image[:1].expand(4, -1)
    params = Params(*case.layers, logit_scale=20.0)
    logits, _ = rada_logits(one_image, case.text, params, case.options, "triton")
    assert torch.equal(logits, dense["logits"][:1].expand(4, -1))
