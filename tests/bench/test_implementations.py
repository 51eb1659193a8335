"""The methods of the measuring rod against each other, and its judgement of what is right."""

from __future__ import annotations

import math

import pytest
import torch
from correctness import Judge, _images_at_a_time, _reference_in_chunks
from implementations import all_methods, choose_methods, result_names, why_unusable, work
from sdpa import attention_with_lse, sdpa_logits
from tolerance import rms
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from workloads import DTYPES, MODES, SUITES, WORKLOADS, choose_cells, make_inputs, workload

from rada_kernels import BACKENDS

CPU = torch.device("cpu")
SIZES = ["b3-k7-d64", "b1-k1-d16", "b2-k1-d32", "b1-k50-d128"]


def results(method, inputs):
    return dict(zip(result_names(inputs), work(all_methods()[method], inputs)(), strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_sdpa_equals_the_reference(size, mode):
    inputs = make_inputs(workload(size), mode, torch.float64, CPU)
    expected, got = results("reference", inputs), results("sdpa", inputs)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_sdpa_is_judged_right():
    torch.compiler.reset()
    inputs = make_inputs(workload("b2-k9-d32"), "step-features", torch.float32, CPU)
    verdict = Judge(inputs).judge(work(all_methods()["sdpa-compiled"], inputs)())
    assert verdict.right, verdict


def plain_attention(query, key, value, factor):
    scores = factor * query @ key.mT
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def attention_inputs():
    generator = torch.Generator().manual_seed(0)

    def rows(n):
        return torch.randn(2, 3, n, 16, generator=generator, dtype=torch.float64, requires_grad=True)

    return rows(10), rows(5), rows(5)


def test_log_sum_exp_gradients():
    """Of rows alone, of log-sum-exps alone (no gradient of rows at all), of both, and zero for one row."""
    inputs = attention_inputs()
    rows, lse = attention_with_lse(*inputs, 0.3)
    plain_rows, plain_lse = plain_attention(*inputs, 0.3)
    torch.testing.assert_close(rows, plain_rows)
    torch.testing.assert_close(lse, plain_lse)
    g_rows, g_lse = torch.randn_like(rows), torch.randn_like(lse)
    one_zero_row = g_rows.clone()
    one_zero_row[0, 1, 2] = 0
    zero = torch.zeros_like
    for pair in ((g_rows, zero(g_lse)), (zero(g_rows), g_lse), (g_rows, g_lse), (one_zero_row, g_lse)):
        got = torch.autograd.grad((rows, lse), inputs, pair, retain_graph=True)
        expected = torch.autograd.grad((plain_rows, plain_lse), inputs, pair, retain_graph=True)
        # A zero row counts as TINY, and its products with numbers of size 1 are lost.
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_flex_attention_means_the_same():
    """The call of the CUDA path: same scale, same log-sum-exps. On the CPU it has no gradients."""
    query, key, value = (t.detach() for t in attention_inputs())
    rows, aux = flex_attention(query, key, value, scale=0.3, return_aux=AuxRequest(lse=True))
    expected_rows, expected_lse = plain_attention(query, key, value, 0.3)
    torch.testing.assert_close(rows, expected_rows)
    torch.testing.assert_close(aux.lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


def test_judge_accepts_every_usable_method_and_rejects_a_wrong_one():
    load = workload("b4-k20-d64")
    inputs = make_inputs(load, "step", torch.float32, CPU)
    judge = Judge(inputs)
    for name, method in all_methods().items():
        if not method.compiled and why_unusable(method, load, torch.float32, CPU) is None:
            verdict = judge.judge(work(method, inputs)())
            assert verdict.right, (name, verdict)
    for index, name in ((0, "logits"), (1, "penalty"), (8, "gradient of key_weight")):
        wrong = work(all_methods()["reference"], inputs)()
        wrong[index] = wrong[index] * (1 + 1e-4)
        verdict = judge.judge(wrong)
        assert not verdict.right
        assert verdict.worst == name
    wrong[0] = torch.full_like(wrong[0], math.nan)
    verdict = judge.judge(wrong)
    assert not verdict.right
    assert verdict.worst == "logits"


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_in_chunks_is_the_reference(mode, monkeypatch):
    inputs = make_inputs(workload("b5-k6-d16"), mode, torch.float64, CPU)
    monkeypatch.setattr("correctness.CHUNK_BYTES", 2 * 20 * 4 * (8 * 36 + 6 * 16))
    assert _images_at_a_time(inputs) == 2
    chunked = _reference_in_chunks(inputs)
    for name, whole, tensor in zip(result_names(inputs), results("reference", inputs).values(), chunked, strict=True):
        torch.testing.assert_close(tensor, whole, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", MODES)
def test_the_judge_knows_truth_and_terms_of_every_result(mode):
    """The terms are those of the loss that is differentiated: as large as its gradients, which do not cancel."""
    inputs = make_inputs(workload("b5-k6-d16"), mode, torch.bfloat16, CPU)
    expected = Judge(inputs).expected
    assert expected.truth.keys() == expected.plain.keys() == set(result_names(inputs)) <= expected.terms.keys()
    for name, true in expected.truth.items():
        assert true.dtype == torch.float64
        if name.startswith("gradient of") and not name.endswith("bias"):  # of which some are what cancellation leaves
            assert 0.1 < rms(expected.terms[name]) / rms(true) < 10, name


def test_methods_are_the_baselines_and_every_backend():
    names = [method.name for method in choose_methods(None)]
    assert names[:4] == ["reference", "reference-compiled", "sdpa", "sdpa-compiled"]
    assert set(names[4:]) == set(BACKENDS) - {"reference"}
    assert [method.name for method in choose_methods(["torch", "sdpa"])] == ["sdpa", "torch"]


def test_inputs_are_the_same_every_time_and_not_degenerate():
    a, b = (make_inputs(workload("b8-k100-d512"), "step", torch.float32, CPU) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.differentiated, b.differentiated, strict=True))
    logits, penalty, *gradients = work(all_methods()["torch"], a)()
    zero_shot = torch.nn.functional.cosine_similarity(a.image[:, None], a.text, dim=-1) * a.params.logit_scale
    assert (logits - zero_shot).std() > 0.05 * zero_shot.std()
    assert 0.2 < penalty < 5
    assert all(gradient.norm() > 0 for gradient in gradients)


def test_suites_hold_known_things():
    for cells in SUITES.values():
        assert cells
        for cell in cells:
            assert cell.mode in cell.workload.modes
            assert cell.dtype in DTYPES
    assert {cell.workload.name for cell in SUITES["paper"]} == set(WORKLOADS)
    assert all(cell.mode == "forward" for cell in SUITES["inference"])


def test_choices():
    cells = choose_cells("quick", ["sun397", "b2-k3-d8"], ["step"], ["float16"])
    assert [(cell.workload.name, cell.mode, cell.dtype) for cell in cells] == [
        ("sun397", "step", "float16"),
        ("b2-k3-d8", "step", "float16"),
    ]
    assert {cell.dtype for cell in choose_cells("paper", None, None, ["bfloat16"])} == {"bfloat16"}
    assert sdpa_logits is all_methods()["sdpa"].head


@pytest.mark.parametrize(
    ("choose", "named", "listed"),
    [
        (lambda: choose_methods(["cuda"]), "'cuda'", "sdpa-compiled"),
        (lambda: choose_cells("nightly", None, None, None), "'nightly'", "training"),
        (lambda: choose_cells("quick", ["cifar10"], None, None), "'cifar10'", "imagenet-vitl"),
        (lambda: choose_cells("quick", ["b2-k3-d9"], None, None), "'b2-k3-d9'", "multiple of the 8 heads"),
        (lambda: choose_cells("quick", None, ["backward"], None), "'backward'", "step-features"),
        (lambda: choose_cells("quick", None, None, ["int8"]), "'int8'", "bfloat16"),
        (lambda: choose_cells("inference", None, ["step"], None), "'step'", "nothing"),
        (lambda: choose_cells("paper", ["imagenet-large-batch"], ["step"], None), "'step'", "nothing"),
    ],
)
def test_unknown_names_list_those_that_exist(choose, named, listed):
    with pytest.raises(ValueError, match=listed) as error:
        choose()
    assert named in str(error.value)
