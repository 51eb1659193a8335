"""RAdaHead: construction, released names, errors, use in a training loop."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rada.fused import RAdaHead
from rada_kernels import BACKENDS, Options, choose_backend
from tests.kernels.test_backends import backends

RELEASED_NAMES = {
    f"{layer}.{kind}"
    for layer in ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")
    for kind in ("weight", "bias")
}


def features(batch=4, classes=6, width=16, dtype=torch.float32):
    return torch.randn(batch, width, dtype=dtype), torch.randn(classes, width, dtype=dtype)


def test_state_dict_has_the_released_names_and_shapes():
    state = RAdaHead(16, 4).state_dict()
    assert set(state) == RELEASED_NAMES
    assert all(tuple(t.shape) == ((16, 16) if name.endswith("weight") else (16,)) for name, t in state.items())


def test_new_head_is_zero_shot():
    image, text = features()
    logits, penalty = RAdaHead(16, 4)(image, text, 100.0, return_penalty=True)
    expected = 100 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).t()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    assert penalty.item() == 0
    assert penalty.shape == ()
    assert penalty.dtype == torch.float32


def test_released_layers_play_their_roles():
    """q_proj1 is the image query, q_proj2 the text query, q_proj3 the rational one."""
    image, text = features()
    for kind, layer in (("image", "q_proj1"), ("text", "q_proj2"), ("rational", "q_proj3")):
        head = RAdaHead(16, 4, queries=(kind,))
        torch.nn.init.normal_(head.out_proj.weight)
        logits = head(image, text, 20.0)
        for other in ("q_proj1", "q_proj2", "q_proj3"):
            tripled = copy.deepcopy(head)
            with torch.no_grad():
                getattr(tripled, other).weight.mul_(3)
            assert torch.equal(tripled(image, text, 20.0), logits) == (other != layer)


@pytest.mark.parametrize("shape", ["wrapped", "bare", "path"])
def test_from_released(shape, tmp_path):
    source = RAdaHead(16, 4, dtype=torch.float16)
    torch.nn.init.normal_(source.out_proj.weight)
    checkpoint = {"state_dict": {f"mha.{k}": v for k, v in source.state_dict().items()}, "epoch": 5}
    checkpoint["state_dict"]["unrelated.weight"] = torch.zeros(2)
    if shape == "bare":
        checkpoint = source.state_dict()
    if shape == "path":
        torch.save(checkpoint, tmp_path / "released.pth.tar")
        checkpoint = tmp_path / "released.pth.tar"
    head = RAdaHead.from_released(checkpoint, 4, temperature=0.5)
    assert head.options == Options(4, 0.5)
    for name, tensor in source.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor)


def test_from_released_names_what_it_found():
    with pytest.raises(ValueError, match=r"encoder\.weight.*takes a state dict with"):
        RAdaHead.from_released({"state_dict": {"encoder.weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match="got a list; it takes a state dict"):
        RAdaHead.from_released({"state_dict": [1]})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(embed_dim=0), ValueError, "embed_dim: got 0; it takes a positive int"),
        (dict(embed_dim=16, num_heads=3), ValueError, "num_heads: got 3; it takes a divisor of embed_dim 16"),
        (dict(embed_dim=16, num_heads=0), ValueError, "num_heads: got 0"),
        (dict(embed_dim=16, num_heads=2.0), TypeError, "num_heads: got 2.0; it takes a positive int"),
        (dict(embed_dim=16, temperature=0), ValueError, "temperature: got 0; it takes a positive"),
        (dict(embed_dim=16, temperature=float("nan")), ValueError, "temperature: got nan"),
        (dict(embed_dim=16, queries=()), ValueError, "queries: got ()"),
        (dict(embed_dim=16, queries=("image", "audio")), ValueError, "queries: got ('image', 'audio')"),
        (dict(embed_dim=16, queries="image"), TypeError, "queries: got 'image'"),
        (dict(embed_dim=16, queries=None), TypeError, "queries: got None"),
        (dict(embed_dim=16, normalize="no"), TypeError, "normalize: got 'no'"),
        (dict(embed_dim=16, penalty="l2"), ValueError, "penalty: got 'l2'; it takes one of"),
        (dict(embed_dim=16, backend="cuda"), ValueError, "backend: got 'cuda'; it takes one of"),
    ],
)
def test_wrong_options_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        RAdaHead(**arguments)
    assert message in str(caught.value)


def wrong_calls():
    image, text = features()
    yield "image of one dimension", (image[0], text, 1.0), ValueError, "image_features: got shape [16]; it takes [B, D]"
    yield "text of three", (image, text[None], 1.0), ValueError, "text_features: got shape [1, 6, 16]"
    yield "widths differ", (image, text[:, :8], 1.0), ValueError, "text_features: got width 8; it takes [K, 16]"
    yield "no class", (image, text[:0], 1.0), ValueError, "text_features: got an empty class set"
    yield (
        "width of another head",
        (image[:, :8], text[:, :8], 1.0),
        ValueError,
        "image_features: got width 8; it takes [B, 16]",
    )
    yield "width that no head divides", (image[:, :7], text[:, :7], 1.0), ValueError, "image_features: got width 7"
    yield "dtypes differ", (image, text.double(), 1.0), TypeError, "text_features: got dtype torch.float64"
    half = "image_features: got dtype torch.float16, but the layers have torch.float32; cast the head, head.to("
    yield "head of another dtype", (image.half(), text.half(), 1.0), TypeError, half + "torch.float16), or the features"
    yield "image of another dtype", (image.half(), text, 1.0), TypeError, half
    yield (
        "head on another device",
        (image.to("meta"), text.to("meta"), 1.0),
        ValueError,
        ("image_features: got device meta, but the layers are on cpu; move the head, head.to('meta'), or the features"),
    )
    yield "integers", (image.long(), text, 1.0), TypeError, "image_features: got dtype torch.int64"
    yield "devices differ", (image, text.to("meta"), 1.0), ValueError, "text_features: got device meta; it takes cpu"
    yield "no tensor", (image.numpy(), text, 1.0), TypeError, "image_features: got ndarray"
    yield "scale of two", (image, text, torch.ones(2)), ValueError, "logit_scale: got shape [2]"
    yield "infinite scale", (image, text, float("inf")), ValueError, "logit_scale: got inf; it takes the exponentiated"
    yield (
        "sparse",
        (image.to_sparse(), text, 1.0),
        TypeError,
        "image_features: got layout torch.sparse_coo; it takes a d",
    )
    yield "negative scale", (image, text, -1.0), ValueError, "logit_scale: got -1.0"
    yield "scale of a string", (image, text, "100"), TypeError, "logit_scale: got str"
    yield "bias of a list", (image, text, 1.0, [0.0]), TypeError, "logit_bias: got list"


@pytest.mark.parametrize(("arguments", "error", "message"), [pytest.param(*c[1:], id=c[0]) for c in wrong_calls()])
def test_wrong_calls_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        RAdaHead(16, 4)(*arguments)
    assert message in str(caught.value)


def test_a_layer_that_is_wrapped_is_named():
    """Of a wrapper the weight alone would be read: what it adds would do nothing, unsaid."""
    head = RAdaHead(16, 4)
    head.k_proj = torch.nn.Sequential(head.k_proj)
    with pytest.raises(TypeError, match=r"k_proj: got Sequential; it takes an nn\.Linear"):
        head(*features(), 1.0)


def test_a_parametrized_layer_trains():
    head = RAdaHead(16, 4)
    torch.nn.init.normal_(head.out_proj.weight)
    torch.nn.utils.parametrizations.weight_norm(head.k_proj)
    head(*features(), 20.0).sum().backward()
    assert head.k_proj.parametrizations.weight.original0.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(dtype=torch.float16), TypeError, "k_proj.weight (params.key_weight): got dtype torch.float16; it takes"),
        (dict(device="meta"), ValueError, "k_proj.weight (params.key_weight): got device meta; it takes cpu, where"),
    ],
)
def test_a_layer_unlike_the_others_is_named(change, error, message):
    head = RAdaHead(16, 4)
    head.k_proj.to(**change)
    with pytest.raises(error) as caught:
        head(*features(), 1.0)
    assert message in str(caught.value)


@pytest.mark.parametrize("image_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", *backends()])
def test_autocast_takes_any_mixture_of_dtypes(backend, image_dtype, text_dtype):
    """As features come from towers under autocast on one side and from a store on the other."""
    head = RAdaHead(16, 4, backend=backend)
    torch.nn.init.normal_(head.out_proj.weight)
    image, text = features()
    image, text = image.to(image_dtype), text.to(text_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, mask = head(image, text, 20.0), head.mask(image, text, 20.0)
        expected = head(image.bfloat16(), text.bfloat16(), 20.0)
    assert mask.dtype == image_dtype
    torch.testing.assert_close(mask.float(), head.mask(image.float(), text.float(), 20.0), rtol=0.05, atol=0.05)
    if backend == "reference":  # torch's own autocast rounds where each product begins
        torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.2)
    else:
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_does_not_mix_with_float64(backend):
    head = RAdaHead(16, 4, backend=backend)
    image, text = features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in (head, head.mask):
            with pytest.raises(TypeError, match=r"image_features: got dtype torch.float64.*head.to\(torch.float64\)"):
                call(image.double(), text.double(), 20.0)
            with pytest.raises(TypeError, match=r"text_features: got dtype torch.float64; it takes torch.float32"):
                call(image, text.double(), 20.0)


def test_backend_for_says_why_not_the_others():
    image, _ = features()
    choice = RAdaHead(16, 4).backend_for(image)
    assert choice in backends(width=16, heads=4)
    names = list(BACKENDS)
    assert list(choice.passed_over) == names[: names.index(choice)]
    assert all(choice.passed_over.values())


def test_environment_chooses_for_auto_only(monkeypatch):
    image, _ = features()
    monkeypatch.setenv("RADA_BACKEND", "reference")
    assert RAdaHead(16, 4).backend_for(image) == "reference"
    assert RAdaHead(16, 4, backend="torch").backend_for(image) == "torch"
    monkeypatch.setenv("RADA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="RADA_BACKEND: got 'nonsense'; it takes one of"):
        RAdaHead(16, 4).backend_for(image)


def test_a_backend_that_cannot_serve_is_an_error(monkeypatch):
    monkeypatch.setattr(BACKENDS["torch"], "usable", lambda *_: (False, "it is Sunday"))
    with pytest.raises(ValueError, match=r"'torch' cannot serve this call \(it is Sunday\).*'reference'"):
        choose_backend("torch", torch.float32, torch.device("cpu"), 16, 4)


@pytest.mark.parametrize("backend", ["reference", *backends()])
def test_logit_bias_and_tensor_scale(backend):
    head = RAdaHead(16, 4, backend=backend)
    image, text = features()
    log_scale = torch.tensor(2.0, requires_grad=True)
    bias = torch.tensor(-3.0, requires_grad=True)
    logits = head(image, text, log_scale.exp(), bias)
    torch.testing.assert_close(logits, head(image, text, log_scale.exp().item()) - 3)
    torch.testing.assert_close(logits, head(image, text, np.float32(log_scale.exp().item())) - 3)
    logits.sum().backward()
    torch.testing.assert_close(bias.grad, torch.tensor(24.0))
    torch.testing.assert_close(log_scale.grad, (logits.detach() + 3).sum(), rtol=1e-4, atol=1e-4)


def test_mask_is_without_gradient_and_of_the_input_dtype():
    head = RAdaHead(16, 4, dtype=torch.bfloat16)
    torch.nn.init.normal_(head.out_proj.weight)
    mask = head.mask(*features(dtype=torch.bfloat16), 20.0)
    assert mask.shape == (4, 6, 16)
    assert mask.dtype == torch.bfloat16
    assert not mask.requires_grad
    assert (mask >= 0).all()


def test_unused_queries_do_not_train():
    head = RAdaHead(16, 4, queries=("text",))
    assert [p.requires_grad for p in (head.q_proj1.weight, head.q_proj2.weight, head.q_proj3.bias)] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("backend", backends())
def test_training_curve_equals_the_references(backend):
    """Thirty Adam steps from one seed: equal losses, parameters and logits."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(7, 16, generator=generator)
    labels = torch.arange(28) % 7
    image = text[labels] + 2 * torch.randn(28, 16, generator=generator)

    def train(name):
        torch.manual_seed(0)
        # Not linf, whose gradient jumps with the place of the maximum.
        head = RAdaHead(16, 4, backend=name, penalty="mse")
        optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
        losses = []
        for _ in range(30):
            logits, penalty = head(image, text, 10.0, return_penalty=True)
            loss = F.cross_entropy(logits, labels) + penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses), head, logits

    losses, head, logits = train(backend)
    expected_losses, expected_head, expected_logits = train("reference")
    assert expected_losses[-1] < 0.8 * expected_losses[0]
    torch.testing.assert_close(losses, expected_losses, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(logits, expected_logits, rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(head.parameters(), expected_head.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
