"""Test-time training against its definition: one image after another, by autograd and torch's own AdamW."""

from __future__ import annotations

import copy

import pytest
import torch

from rada import RAdaHead
from rada.classification import Classes
from rada.tuning import test_time
from rada.tuning.test_time import Adaptation
from tests.kernels.test_backends import backends

WIDTH, HEADS, VIEWS, SCALE = 32, 4, 24, 20.0
EVERYTHING = ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")
every_backend = pytest.mark.parametrize("backend", ["reference", *backends()])


def head_of(trained=True, dtype=torch.float32, backend="auto", **options):
    head = RAdaHead(WIDTH, HEADS, dtype=dtype, backend=backend, **options)
    if trained:
        torch.nn.init.normal_(head.out_proj.weight, std=0.3)
        torch.nn.init.normal_(head.out_proj.bias, std=0.1)
    return head.eval()


def classes_of(count=11, dtype=torch.float32, bias=None):
    return Classes(torch.randn(count, WIDTH, dtype=dtype), SCALE, bias)


def views_of(classes, images=5, views=VIEWS):
    """Views around class features, far enough from them that predictions are not certain."""
    text = torch.nn.functional.normalize(classes.text, dim=-1)
    centres = text[torch.arange(images) % len(text)] + 0.1 * torch.randn(images, WIDTH).to(text)
    return centres[:, None] + 0.15 * torch.randn(images, views, WIDTH).to(text)


def entropy(p):
    return -(p * p.log()).sum(-1)


def by_definition(head, classes, views, adaptation=None, online=False):
    """Logits [N, K] of one image after another: a head of its own, plain autograd, a fresh torch.optim.AdamW."""
    adaptation = adaptation or Adaptation()
    rows, worker, optimizer = [], None, None
    for image in views:
        if worker is None or not online:
            worker = copy.deepcopy(head).requires_grad_(False)
            adapted = [
                parameter.requires_grad_()
                for name, parameter in worker.named_parameters()
                if name in adaptation.parameters or name.split(".")[0] in adaptation.parameters
            ]
            optimizer = torch.optim.AdamW(adapted, lr=adaptation.lr, weight_decay=adaptation.weight_decay)
        with torch.no_grad():
            order = entropy(worker(image, *classes).softmax(-1)).argsort()
        kept = order[: max(1, int(adaptation.selection * len(image)))]
        for _ in range(adaptation.steps):
            optimizer.zero_grad()
            entropy(worker(image[kept], *classes).softmax(-1).mean(0)).backward()
            optimizer.step()
        with torch.no_grad():
            rows.append(worker(image[:1], *classes)[0])
    return torch.stack(rows)


def adapt(head, classes, views, adaptation=None, **options):
    return test_time.TestTimeAdapter(head, classes, adaptation, **options)(views)


PARAMETERS = [
    ("out_proj",),
    ("out_proj.bias",),
    ("out_proj.weight",),
    ("v_proj", "out_proj"),
    ("q_proj3", "k_proj.weight"),
    EVERYTHING,
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids="+".join)
@pytest.mark.parametrize(("trained", "steps"), [(False, 1), (True, 1), (True, 3)])
def test_float64_truth(parameters, trained, steps):
    head, classes = head_of(trained, torch.float64), classes_of(dtype=torch.float64, bias=-3.0)
    views = views_of(classes)
    adaptation = Adaptation(steps=steps, selection=0.25, parameters=parameters)
    expected = by_definition(head, classes, views, adaptation)
    adapted = adapt(head, classes, views, adaptation)
    torch.testing.assert_close(adapted.logits, expected, rtol=1e-9, atol=1e-9)
    if trained or "out_proj" in parameters[-1]:
        assert (adapted.logits - head(views[:, 0], *classes)).abs().max() > 1e-3  # it does adapt
    torch.testing.assert_close(adapted.zero_shot, classes.zero_shot(views[:, 0]))


@every_backend
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("parameters", PARAMETERS, ids="+".join)
def test_parallel_equals_one_by_one(backend, parameters, trained):
    head, classes = head_of(trained, backend=backend), classes_of()
    views, adaptation = views_of(classes, images=7), Adaptation(parameters=parameters)
    adapter = test_time.TestTimeAdapter(head, classes, adaptation)
    together = adapter(views)
    apart = [adapter(image[None]) for image in views]
    assert torch.equal(together.kept, torch.cat([one.kept for one in apart]))
    for name in ("logits", "zero_shot"):
        one_by_one = torch.cat([getattr(one, name) for one in apart])
        torch.testing.assert_close(getattr(together, name), one_by_one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.logits, by_definition(head, classes, views, adaptation), rtol=1e-4, atol=1e-4)


def test_chunks_of_any_size_agree():
    head, classes = head_of(), classes_of()
    views = views_of(classes, images=7)
    one, some, all_ = (test_time.TestTimeAdapter(head, classes, episode_bytes=size) for size in (1, 200_000, 1 << 30))
    assert [adapter._episodes_at_once(VIEWS) for adapter in (one, some)] == [1, 4]
    assert all_._episodes_at_once(VIEWS) > 7
    for adapter in (some, all_):
        torch.testing.assert_close(adapter(views).logits, one(views).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parameters", [("out_proj",), EVERYTHING], ids=["output layer", "everything"])
def test_the_reset_is_exact(parameters):
    head, classes = head_of(), classes_of()
    for parameter in head.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = copy.deepcopy(head.state_dict())
    adapter = test_time.TestTimeAdapter(head, classes, Adaptation(parameters=parameters))
    views, others = views_of(classes), views_of(classes, images=3)
    first = adapter(views)
    adapter(others)
    again = adapter(views)
    assert all(map(torch.equal, first, again))
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(parameter.grad, torch.full_like(parameter, 7.0))


@pytest.mark.parametrize("parameters", [("out_proj",), EVERYTHING], ids=["output layer", "everything"])
@pytest.mark.parametrize("trained", [False, True])
def test_online_carries_parameters_and_optimizer_on(parameters, trained):
    head, classes = head_of(trained, torch.float64), classes_of(dtype=torch.float64)
    views, adaptation = views_of(classes, images=6), Adaptation(parameters=parameters, online=True)
    adapter = test_time.TestTimeAdapter(head, classes, adaptation)
    in_two_calls = torch.cat([adapter(views[:2]).logits, adapter(views[2:]).logits])
    expected = by_definition(head, classes, views, adaptation, online=True)
    torch.testing.assert_close(in_two_calls, expected, rtol=1e-8, atol=1e-8)
    assert (in_two_calls - by_definition(head, classes, views, adaptation)).abs().max() > 1e-2
    adapter.reset()
    torch.testing.assert_close(adapter(views).logits, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("selection", "views", "kept"), [(0.1, 64, 6), (0.1, 9, 1), (0.5, 7, 3), (1.0, 7, 7)])
def test_the_views_of_least_entropy_are_kept(selection, views, kept):
    head, classes = head_of(), classes_of()
    features = views_of(classes, images=3, views=views)
    adapted = adapt(head, classes, features, Adaptation(selection=selection))
    assert adapted.kept.shape == (3, kept)
    entropies = entropy(head(features.flatten(0, 1), *classes).softmax(-1)).detach().view(3, views)
    for row, chosen in zip(entropies, adapted.kept, strict=True):
        left_out = torch.ones(views, dtype=torch.bool).index_fill(0, chosen, False)
        assert (row[chosen].diff() >= 0).all()
        assert not left_out.any() or row[chosen].max() <= row[left_out].min()


def test_an_untrained_head_selects_without_attention(monkeypatch):
    head, classes = head_of(trained=False), classes_of()
    views = views_of(classes)
    expected = adapt(head, classes, views)
    monkeypatch.setattr(head, "forward", None)
    assert torch.equal(adapt(head, classes, views).logits, expected.logits)


@pytest.mark.parametrize(("classes", "views"), [(1, VIEWS), (11, 1), (1, 1)])
@pytest.mark.parametrize("parameters", [("out_proj",), EVERYTHING], ids=["output layer", "everything"])
def test_one_class_and_one_view(classes, views, parameters):
    head, classes = head_of(dtype=torch.float64), classes_of(classes, dtype=torch.float64)
    features, adaptation = views_of(classes, views=views), Adaptation(parameters=parameters)
    expected = by_definition(head, classes, features, adaptation)
    adapted = adapt(head, classes, features, adaptation)
    torch.testing.assert_close(adapted.logits, expected, rtol=1e-9, atol=1e-9)
    assert adapted.kept.shape == (5, max(1, views // 10))


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("parameters", [("out_proj",), EVERYTHING], ids=["output layer", "everything"])
def test_no_images_give_no_logits(parameters, online):
    head, classes, adaptation = head_of(), classes_of(), Adaptation(parameters=parameters, online=online)
    adapter, views = test_time.TestTimeAdapter(head, classes, adaptation), views_of(classes)
    adapted = adapter(views[:0])
    assert adapted.logits.shape == adapted.zero_shot.shape == (0, 11)
    assert adapted.kept.shape == (0, 2)
    assert torch.equal(adapter(views).logits, adapt(head, classes, views, adaptation).logits)


def test_nan_stays_in_its_image():
    head, classes = head_of(), classes_of()
    views = views_of(classes)
    expected = adapt(head, classes, views).logits
    views[2, 5, 3] = float("nan")
    views[3] = float("nan")
    logits = adapt(head, classes, views).logits
    assert logits[3].isnan().all()
    assert logits[2].isfinite().all()  # a view without a prediction is not kept
    torch.testing.assert_close(logits[[0, 1, 4]], expected[[0, 1, 4]], rtol=1e-5, atol=1e-5)


def test_without_normalisation():
    head, classes = head_of(normalize=False), classes_of()._replace(logit_scale=1.0)
    views = views_of(classes)
    torch.testing.assert_close(
        adapt(head, classes, views).logits, by_definition(head, classes, views), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("parameters", [("out_proj",), EVERYTHING], ids=["output layer", "everything"])
def test_bfloat16_adapts_as_float32_does(parameters):
    head, classes = head_of(), classes_of()
    views, adaptation = views_of(classes), Adaptation(parameters=parameters)
    low = Classes(classes.text.bfloat16(), SCALE)
    adapted = adapt(copy.deepcopy(head).bfloat16(), low, views.bfloat16(), adaptation)
    assert adapted.logits.dtype == torch.float32
    exact = adapt(head, classes, views, adaptation)
    assert (adapted.logits - exact.logits).abs().max() < 0.05 * exact.logits.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
        ({"selection": 0.0}, "selection: got 0.0"),
        ({"selection": 1.5}, "selection: got 1.5"),
        ({"parameters": ()}, r"parameters: got \(\)"),
        ({"parameters": "out_proj"}, "parameters: got 'out_proj'"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Adaptation(**arguments)


def test_bad_names_and_views():
    head, classes = head_of(queries=("image", "text")), classes_of()
    for name in ("out", "q_proj3", "logit_scale"):
        with pytest.raises(ValueError, match=f"parameters: got '{name}'; it takes names of .*'out_proj'"):
            test_time.TestTimeAdapter(head, classes, Adaptation(parameters=(name,)))
    adapter = test_time.TestTimeAdapter(head, classes)
    for views in (torch.zeros(3, 0, WIDTH), torch.zeros(3, WIDTH), torch.zeros(3, 4, WIDTH + 1)):
        with pytest.raises(ValueError, match=r"views: got shape .* with V at least 1"):
            adapter(views)
    with pytest.raises(TypeError, match=r"views: got torch.float64 on cpu; it takes torch.float32"):
        adapter(torch.zeros(3, 4, WIDTH, dtype=torch.float64))
    with pytest.raises(TypeError, match="views: got list"):
        adapter([])
