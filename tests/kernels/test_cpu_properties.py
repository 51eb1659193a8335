"""What holds of the C++ operators at every size: their error, and what their results may and may not depend on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rada.fused import RAdaHead
from rada_kernels import PENALTIES, Params, rada_logits
from rada_kernels.backends import cpu
from tests.kernels.forked import in_forked_child, needs_fork
from tests.kernels.test_backends import DTYPES
from tests.kernels.test_reference import SUBSETS
from tests.kernels.truth import assert_as_good_as_reference, make_case, results, steady_case

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def logits_of(case, image=None, text=None):
    params = Params(*case.layers, logit_scale=20.0)
    image, text = case.image if image is None else image, case.text if text is None else text
    return rada_logits(image, text, params, case.options, "cpu")


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 9),
    classes=st.integers(1, 70),
    head_width=st.integers(3, 70),
    heads=st.integers(1, 3),
    queries=st.sampled_from(SUBSETS),
    penalty=st.sampled_from(PENALTIES),
    features=st.booleans(),
    threads=st.integers(1, 3),
    save_bytes=st.sampled_from(["0", "100000", "100000000"]),
    tile_bytes=st.sampled_from(["1", "100000000"]),
)
@every_dtype
def test_any_call(
    dtype, batch, classes, head_width, heads, queries, penalty, features, threads, save_bytes, tile_bytes
):
    """Odd widths, every subset of queries, penalty and budget, one to three threads."""
    if dtype != torch.float32 and penalty == "linf":
        penalty = "mse"  # in 16 bits near ties decide where linf's gradient goes
    width = heads * head_width
    options = {"queries": queries, "penalty": penalty, "scale": width / 4, "clear_gates": dtype != torch.float32}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RADA_SAVE_BYTES", save_bytes)
        patch.setenv("RADA_TILE_BYTES", tile_bytes)
        try:
            cases = [steady_case(batch, classes, width, heads, seed=seed, **options) for seed in range(4)]
            assert_as_good_as_reference(cases, "cpu", dtype, features=features)
        finally:
            torch.set_num_threads(before)


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(2, 9), classes=st.integers(2, 70), seed=st.integers(0, 100))
def test_order_of_images_and_classes_does_not_matter(batch, classes, seed):
    case = make_case(batch, classes, 24, 3, seed=seed, penalty="mse").cast(torch.float32)
    plain = results(case, "cpu")
    images, order = torch.randperm(batch), torch.randperm(classes)
    case.image, case.text, case.weight = case.image[images], case.text[order], case.weight[images][:, order]
    permuted = results(case, "cpu")
    expected = plain | {
        "logits": plain["logits"][images][:, order],
        "grad image": plain["grad image"][images],
        "grad text": plain["grad text"][order],
    }
    for name, tensor in permuted.items():
        size = expected[name].square().mean().sqrt().item()
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3 * max(size, 1e-3), msg=name)


@every_dtype
def test_an_image_does_not_see_the_others(dtype):
    """Alone, in a small batch and in one of several slices: the same logits."""
    case = make_case(90, 33, 32, 4, clear_gates=True).cast(dtype)
    whole, _ = logits_of(case)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for images in (slice(0, 1), slice(89, 90), slice(3, 8)):
        part, _ = logits_of(case, case.image[images])
        torch.testing.assert_close(part, whole[images], rtol=tolerance, atol=tolerance * whole.abs().max().item())


@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("batch", "classes"), [(5, 9), (3, 70)])
def test_nan_and_inf_stay_in_their_image(dtype, value, batch, classes):
    """In the logits and in the features' gradients, bit by bit; the penalty, a mean over the images, shows it."""
    case = make_case(batch, classes, 32, 4, penalty="mse").cast(dtype)
    clean = results(case, "cpu")
    for column in (0, 31):
        image = case.image.clone()
        image[1, column] = value
        case.image, kept = image, case.image
        dirty = results(case, "cpu")
        case.image = kept
        assert dirty["logits"][1].isnan().all()
        assert dirty["penalty"].isnan()
        others = [b for b in range(batch) if b != 1]
        for name in ("logits", "grad image"):
            assert torch.equal(dirty[name][others], clean[name][others]), name


@every_dtype
def test_expanded_and_strided_upstream_gradients(dtype):
    case = make_case(4, 9, 24, 3).cast(dtype)
    layers = [t.requires_grad_() for t in case.layers]
    logits, _ = rada_logits(case.image, case.text, Params(*layers, logit_scale=20.0), case.options, "cpu")
    dense = torch.randn(9, 4, dtype=dtype)
    for strided in (torch.ones((), dtype=dtype).expand(4, 9), dense.t(), dense[0].expand(9, 4).t()):
        got = torch.autograd.grad(logits, layers, strided, retain_graph=True)
        expected = torch.autograd.grad(logits, layers, strided.contiguous(), retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def _logits(head, image, text):
    with torch.no_grad():
        return head(image, text, 20.0).float().numpy()


@needs_fork
@every_dtype
@pytest.mark.parametrize(("batch", "classes", "width"), [(3, 5, 16), (70, 3, 512), (2, 80, 512)])
def test_the_whole_head_in_a_forked_child(dtype, batch, classes, width):
    """At the parent's thread count, whose threads the child lacks: nothing in the call may wait for them.

    The larger features have more elements than torch handles without its threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        head = RAdaHead(width, 4, backend="cpu", dtype=dtype)
        torch.nn.init.normal_(head.out_proj.weight, std=0.3)  # else the attention would not show in the logits
        image, text = torch.randn(batch, width, dtype=dtype), torch.randn(classes, width, dtype=dtype)
        expected = head(image, text, 20.0).detach()
        (torch.randn(512, 512) @ torch.randn(512, 512)).exp()  # the parent has started its threads
        logits = in_forked_child(_logits, head, image, text)
        torch.testing.assert_close(torch.from_numpy(logits), expected.float())
    finally:
        torch.set_num_threads(before)
