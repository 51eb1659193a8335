"""Adapters, alone and under a head, against the released step in plain PyTorch, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from rada import RAdaHead
from rada.adapter import AdaptedHead, FeatureAdapter
from rada.losses import CrossEntropy
from tests.rada.formula import float64_head, released_head

SCALE = torch.tensor(20.0, dtype=torch.float64)
# The released factors of 5 epochs; the first is warm-up at 1e-5.
LR, FACTORS = 3.5e-3, (1e-5 / 3.5e-3, 0.9045084971874737, 0.6545084971874737, 0.34549150281252633)


def features(batch: int = 4, classes: int = 5, width: int = 12):
    return (3 * torch.randn(n, width, dtype=torch.float64) for n in (batch, classes))


def adapted(mix: bool, **options) -> AdaptedHead:
    head = float64_head(penalty="mse", **options)
    if mix:
        return AdaptedHead(head)
    adapters = (FeatureAdapter(12, mix=None, dtype=torch.float64) for _ in range(2))
    return AdaptedHead(head, image_adapter=next(adapters), text_adapter=next(adapters))


def released(model: AdaptedHead, image: torch.Tensor, text: torch.Tensor):
    """The released trainers' logits and penalty: features adapted before they are divided by their norms."""

    def adapt(adapter, f):
        a = torch.relu(torch.relu(f @ adapter.down.weight.T) @ adapter.up.weight.T)
        return f + a if adapter.mix is None else adapter.mix * a + (1 - adapter.mix) * f

    return released_head(adapt(model.image_adapter, image), adapt(model.text_adapter, text), SCALE, model.head)


def test_the_released_starts():
    model = AdaptedHead(RAdaHead(16, 4))
    assert (model.image_adapter.mix.item(), model.text_adapter.mix.item()) == (pytest.approx(0.2), 0.0)
    assert {name: tuple(p.shape) for name, p in model.image_adapter.named_parameters()} == {
        "mix": (), "down.weight": (4, 16), "up.weight": (16, 4),
    }  # fmt: skip


@pytest.mark.parametrize("mix", [True, False])
def test_released_steps(mix):
    """Loss, penalty, gradients and parameters over four epochs of one step, by Adam and the released rates."""
    model = adapted(mix)
    plain = copy.deepcopy(model)
    image, text = features()
    labels = torch.tensor([4, 0, 2, 2])
    loss = CrossEntropy(alpha=0.7)
    optimizers = [torch.optim.Adam(m.parameters(), lr=LR, weight_decay=5e-4) for m in (model, plain)]
    for factor in FACTORS:
        logits, penalty = model(image, text, SCALE, return_penalty=True)
        value = loss(logits, labels, penalty)
        plain_logits, plain_penalty = released(plain, image, text)
        plain_value = F.cross_entropy(plain_logits, labels) + 0.7 * plain_penalty
        torch.testing.assert_close(logits, plain_logits)
        torch.testing.assert_close(penalty.double(), plain_penalty, rtol=1e-6, atol=0)  # the penalty is float32
        torch.testing.assert_close(value, plain_value, rtol=1e-7, atol=0)
        for optimizer, result in zip(optimizers, (value, plain_value), strict=True):
            optimizer.zero_grad()
            result.backward()
            optimizer.param_groups[0]["lr"] = LR * factor
            optimizer.step()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mix", [0.2, None])
def test_gradients_are_the_functions(mix):
    adapter = FeatureAdapter(8, mix=mix, dtype=torch.float64)
    model = AdaptedHead(float64_head(8, 2), image_adapter=adapter, text_adapter=adapter)
    image, text = features(2, 3, 8)
    names, parameters = zip(*adapter.named_parameters(prefix="image_adapter"), strict=True)

    def call(*tensors):
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (image, text, SCALE))

    assert torch.autograd.gradcheck(call, tuple(p.detach().clone().requires_grad_() for p in parameters))


def test_features_of_any_length_give_the_same():
    """No layer has a bias: adapting before or after the division by the norm is one thing."""
    model = adapted(True)
    with torch.no_grad():
        model.text_adapter.mix.fill_(0.4)
    image, text = features()
    unit = (F.normalize(image, dim=-1), F.normalize(text, dim=-1))
    torch.testing.assert_close(model(*unit, SCALE), model(image, text, SCALE))


def test_an_untrained_text_adapter_leaves_the_text():
    adapter = FeatureAdapter(12, mix=0.0, dtype=torch.float64)
    _, text = features()
    torch.testing.assert_close(adapter(text), text)
    adapter(text).square().sum().backward()
    assert adapter.mix.grad.abs() > 0  # it moves all the same


def test_an_adapter_of_one_modality():
    model = AdaptedHead(float64_head(), text_adapter=torch.nn.Identity())
    image, text = features()
    torch.testing.assert_close(model(image, text, SCALE), model.head(model.image_adapter(image), text, SCALE))


@pytest.mark.parametrize("mix", [0.2, None])
def test_an_adapter_is_made_again_from_its_options(mix):
    adapter = FeatureAdapter(10, reduction=3, mix=mix)
    twin = FeatureAdapter(**adapter.options)
    twin.load_state_dict(adapter.state_dict())
    features = torch.randn(2, 10)
    torch.testing.assert_close(twin(features), adapter(features))


def test_mask_is_that_of_the_adapted_features():
    model = adapted(True)
    image, text = features()
    mask = model.mask(image, text, SCALE)
    assert not mask.requires_grad
    f = F.normalize(model.image_adapter(image), dim=-1)[:, None]
    h = F.normalize(model.text_adapter(text), dim=-1)
    torch.testing.assert_close(SCALE * (mask * f * h).sum(-1), model(image, text, SCALE))


def test_autocast():
    model = AdaptedHead(RAdaHead(16, 4))
    image, text = torch.randn(3, 16), torch.randn(4, 16)
    exact = model(image, text, 20.0)
    with torch.autocast("cpu", torch.bfloat16):
        logits, penalty = model(image, text, 20.0, return_penalty=True)
    assert logits.dtype == penalty.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=0.5, rtol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureAdapter(8, reduction=9), r"reduction: got 9; it takes 1..8, the width of the features"),
        (lambda: AdaptedHead(RAdaHead(8, normalize=False)), r"head: got normalize=False; it takes a head that"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
