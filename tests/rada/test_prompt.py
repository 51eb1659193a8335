"""Learned prompts in small open_clip models of every architecture class."""

from __future__ import annotations

import copy
import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

from rada import RAdaCLIP, RAdaHead
from rada.adapter import AdaptedHead
from rada.demo import load_demo_model
from rada.losses import CrossEntropy, PromptSRC
from rada.prompt import PromptedEncoder, PromptedHead, PromptLearner, gaussian_average, image_tower, text_tower
from tests.rada.formula import float64_head, released_head
from tests.rada.test_clip import SIGLIP_TEXT, SIGLIP_VISION, TEXT, VISION, Letters, build

NAMES = ("red fox", "sea_deep", "tree", "crane", "kite")
SCALE = torch.tensor(20.0, dtype=torch.float64)


class Simple:
    """CLIP's tokenizer, for texts of up to 12 tokens."""

    def __call__(self, texts):
        return open_clip.SimpleTokenizer(context_length=12)(texts)


def model_of(kind: str, layers: int = 3):
    """A small open_clip model, and its tokenizer."""
    if kind == "time first":  # [L, N, width] between its blocks, as open_clip's models were
        model, _ = model_of("clip", layers)
        for transformer in (model.transformer, model.visual.transformer):
            transformer.batch_first = False
            for block in transformer.resblocks:
                block.attn.batch_first = False
        return model, Simple()
    if kind == "timm":
        return open_clip.CustomTextCLIP(192, SIGLIP_VISION, SIGLIP_TEXT, init_logit_bias=-10.0).eval(), Letters()
    if kind == "clip":
        text, vision = (config | {"layers": layers} for config in (TEXT, VISION))
        return open_clip.CLIP(16, vision, text).eval(), Simple()
    model, tokenizer = build(kind)
    return model.eval(), tokenizer or Simple()


def pixels(model, count: int = 3, dtype=torch.float32) -> torch.Tensor:
    size = model.visual.image_size
    return torch.randn(count, 3, *((size, size) if isinstance(size, int) else size), dtype=dtype)


def randomize(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)


@pytest.mark.parametrize("kind", ["clip", "time first", "siglip", "coca", "resnet", "demo"])
@pytest.mark.parametrize("text_tokens", [2, 4])
def test_a_new_context_gives_the_plain_prompts_features(kind, text_tokens):
    if kind == "demo":
        model, _, tokenizer = load_demo_model()
    else:
        model, tokenizer = model_of(kind)
    prompt = PromptLearner(model, tokenizer, text_tokens=text_tokens, image_tokens=0, depth=1)
    encoder = PromptedEncoder(model, prompt)
    plain = tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    assert torch.equal(prompt.tokenize(NAMES), plain)
    expected = model.encode_text(plain)
    torch.testing.assert_close(encoder.encode_text(plain), expected)
    head = PromptedHead(encoder, RAdaHead(expected.shape[1], 4), NAMES)
    torch.testing.assert_close(head.class_features(expected), F.normalize(expected, dim=-1))


@pytest.mark.parametrize("kind", ["clip", "time first", "siglip", "coca", "timm"])
def test_the_model_is_as_before_once_the_prompt_is_off(kind):
    model, tokenizer = model_of(kind)
    prompt = PromptLearner(model, tokenizer)
    encoder = PromptedEncoder(model, prompt)
    randomize(prompt)
    images, tokens = pixels(model, 1), prompt.tokenize(NAMES[:2])
    blocks = [list(tower(model).blocks) for tower in (text_tower, image_tower)]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model.encode_text(tokens), model.encode_image(images)
    prompted = encoder.encode_text(tokens), encoder.encode_image(images)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(before, prompted, strict=True))
    with pytest.raises(RuntimeError, match="stop"), prompt.in_image(model), prompt.in_text(model, tokens):
        raise RuntimeError("stop")
    after = model.encode_text(tokens), model.encode_image(images)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for tower, own in zip((text_tower, image_tower), blocks, strict=True):
        assert all(a is b for a, b in zip(tower(model).blocks, own, strict=True))
        assert not tower(model).embedding._forward_hooks
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if not tensor.isnan().any()
    )


def by_hand(model, prompt, images, tokens):
    """Both towers of open_clip's CLIP under the prompt, written out layer by layer."""
    start, n = prompt.start, prompt.text_context.shape[1]
    x = model.token_embedding(tokens)
    for layer, block in enumerate(model.transformer.resblocks):
        if layer < len(prompt.text_context):
            context = prompt.text_context[layer].repeat(len(x), 1, 1)
            x = torch.cat([x[:, :start], context, x[:, start + n :]], 1)
        if layer == 0:
            x = x + model.positional_embedding
        x = block(x, attn_mask=model.attn_mask)
    text = model.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection

    visual = model.visual
    x = visual.conv1(images).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    own = x.shape[1]
    for layer, block in enumerate(visual.transformer.resblocks):
        if layer < len(prompt.image_context):
            x = torch.cat([x[:, :own], prompt.image_context[layer].repeat(len(x), 1, 1)], 1)
        x = block(visual.ln_pre(x) if layer == 0 else x)
    return visual.ln_post(x)[:, 0] @ visual.proj, text


@pytest.mark.parametrize("kind", ["clip", "time first"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_enter_each_layer(kind, depth):
    torch.manual_seed(1)
    model, tokenizer = model_of("clip")
    model = model.double()
    prompt = PromptLearner(model, tokenizer, text_tokens=3, image_tokens=2, depth=depth)
    randomize(prompt)
    images, tokens = pixels(model, dtype=torch.float64), prompt.tokenize(NAMES)
    expected = by_hand(model, prompt, images, tokens)
    gradients = torch.autograd.grad([f.square().sum() for f in expected], list(prompt.parameters()))
    if kind == "time first":
        other, _ = model_of(kind)
        other.double().load_state_dict(model.state_dict())
        model = other
    encoder = PromptedEncoder(model, prompt)
    features = encoder.encode_image(images), encoder.encode_text(tokens)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(
        torch.autograd.grad([f.square().sum() for f in features], list(prompt.parameters())), gradients
    )


@pytest.mark.parametrize("kind", ["clip", "time first"])
def test_gradient_checkpointing_repeats_the_prompt(kind):
    model, tokenizer = model_of(kind)
    prompt = PromptLearner(model, tokenizer)
    randomize(prompt)
    encoder = PromptedEncoder(model, prompt)
    images, tokens = pixels(model), prompt.tokenize(NAMES)

    def gradients():
        loss = encoder.encode_image(images).square().sum() + encoder.encode_text(tokens).square().sum()
        return torch.autograd.grad(loss, list(prompt.parameters()))

    expected = gradients()
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), expected)


@pytest.mark.parametrize("kind", ["clip", "siglip", "coca", "timm"])
def test_gradients_reach_prompt_and_head_alone(kind):
    model, tokenizer = model_of(kind)
    encoder = PromptedEncoder(model, PromptLearner(model, tokenizer))
    with torch.no_grad():
        frozen = model.encode_text(encoder.prompt.tokenize(NAMES))
    head = RAdaHead(frozen.shape[1], 4, penalty="mse")
    with torch.no_grad():
        head.out_proj.weight.normal_()
    tuned = PromptedHead(encoder, head, NAMES, regularizer=PromptSRC()).train()
    assert not any(module.training for module in model.modules())
    bias = encoder.logit_bias
    logits, penalty, regularizer = tuned(pixels(model, 2), frozen, encoder.logit_scale.exp(), bias, return_penalty=True)
    CrossEntropy()(logits, torch.tensor([1, 3]), penalty, regularizer).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.prompt.parameters())
    assert {name.split(".")[0] for name, p in tuned.trained.named_parameters() if p.grad is not None} == {
        "prompt",
        "head",
    }
    assert {id(p) for p in tuned.parameters() if p.requires_grad} == {
        id(p) for p in tuned.trained.parameters() if p.requires_grad
    }


def test_released_step():
    """Loss, penalty, gradients and parameters of one step of SGD, against the released formulas in plain PyTorch."""
    model, tokenizer = model_of("clip")
    model = model.double()
    encoder = PromptedEncoder(model, PromptLearner(model, tokenizer))
    randomize(encoder.prompt)
    head = float64_head(16, 4, penalty="mse")
    tuned = PromptedHead(encoder, head, NAMES, regularizer=PromptSRC())
    prompt, plain_head = copy.deepcopy((encoder.prompt, head))
    images, labels = pixels(model, 4, torch.float64), torch.tensor([2, 0, 4, 2])
    templates = ("a photo of a {}.", "a drawing of a {}.")
    with torch.no_grad():
        rows = [model.encode_text(tokenizer([t.format(n.replace("_", " ")) for t in templates])) for n in NAMES]
        frozen = torch.stack([F.normalize(F.normalize(row, dim=-1).mean(0), dim=-1) for row in rows])

    outputs = tuned(images, frozen, SCALE, return_penalty=True)
    loss = CrossEntropy(alpha=0.3)(outputs[0], labels, *outputs[1:])

    image, text = by_hand(model, prompt, images, prompt.tokenize(NAMES))
    image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    logits, penalty = released_head(image, (text + frozen) / 2, SCALE, plain_head)
    with torch.no_grad():
        frozen_image = F.normalize(model.encode_image(images), dim=-1)
        zero_shot = (SCALE * frozen_image @ frozen.T).log_softmax(1)
    expected = (
        F.cross_entropy(logits, labels)
        + 0.3 * penalty
        + 25 * (text - frozen).abs().mean()
        + 10 * (image - frozen_image).abs().mean()
        + (zero_shot.exp() * (zero_shot - logits.log_softmax(1))).sum() / logits.numel()
    )
    torch.testing.assert_close(outputs[0], logits)
    torch.testing.assert_close(outputs[1].double(), penalty, rtol=1e-6, atol=0)  # the penalty is float32
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    plain = torch.nn.ModuleDict({"prompt": prompt, "head": plain_head})
    for trained, value in ((tuned.trained, loss), (plain, expected)):
        value.backward()
        torch.optim.SGD(trained.parameters(), lr=3.5e-3, momentum=0.9, weight_decay=5e-4).step()
    for (name, p), q in zip(tuned.trained.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}")


def test_a_text_tower_of_transformers_in_an_open_clip_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "hf_proj_type": "linear"}
    model = open_clip.CustomTextCLIP(16, VISION, text).eval()
    prompt = PromptLearner(model, Letters(), depth=1)
    encoder, tokens = PromptedEncoder(model, prompt), prompt.tokenize(NAMES)
    expected = model.encode_text(tokens)
    torch.testing.assert_close(encoder.encode_text(tokens), expected)
    deep = PromptedEncoder(model, PromptLearner(model, Letters(), depth=2))
    assert not torch.allclose(deep.encode_text(tokens), expected, atol=1e-5)
    deep.encode_text(tokens).square().sum().backward()
    assert deep.prompt.text_context.grad.abs().sum((1, 2)).gt(0).all()
    torch.testing.assert_close(model.encode_text(tokens), expected)


def test_a_trained_prompt_serves_as_an_encoder():
    """Under RAdaCLIP as any model is."""
    model, tokenizer = model_of("clip")
    encoder = PromptedEncoder(model, PromptLearner(model, tokenizer))
    randomize(encoder.prompt)
    clip = RAdaCLIP.from_open_clip(encoder, ("red fox", "tree"), tokenizer=tokenizer, num_heads=4)
    images, tokens = pixels(model), encoder.prompt.tokenize(("red fox", "tree"))
    cosines = F.normalize(encoder.encode_image(images), dim=-1) @ F.normalize(encoder.encode_text(tokens), dim=-1).T
    torch.testing.assert_close(clip(images), model.logit_scale.exp() * cosines)
    assert set(clip.state_dict()) == {f"head.{name}" for name in clip.head.state_dict()}


def tuned_on_features(head=None):
    model, tokenizer = model_of("clip")
    encoder = PromptedEncoder(model, PromptLearner(model, tokenizer, image_tokens=0))
    randomize(encoder.prompt)
    with torch.no_grad():
        frozen = F.normalize(model.encode_text(encoder.prompt.tokenize(NAMES)), dim=-1)
    return PromptedHead(encoder, head or RAdaHead(16, 4), NAMES), frozen


def test_cached_features_in_place_of_images():
    """Without image tokens the image tower need not run again."""
    tuned, frozen = tuned_on_features()
    images = pixels(tuned.encoder.model)
    features = F.normalize(tuned.encoder.model.encode_image(images), dim=-1)
    torch.testing.assert_close(tuned(features, frozen, 20.0), tuned(images, frozen, 20.0))
    tuned.regularizer = PromptSRC()
    for a, b in zip(*(tuned(x, frozen, 20.0, -3.0, return_penalty=True) for x in (features, images)), strict=True):
        torch.testing.assert_close(a, b)


def test_an_adapter_goes_with_a_prompt():
    tuned, frozen = tuned_on_features(AdaptedHead(RAdaHead(16, 4)))
    features = torch.randn(3, 16)
    text = tuned.class_features(frozen)
    torch.testing.assert_close(tuned(features, frozen, 20.0), tuned.head(features, text, 20.0))


def test_other_classes_under_the_same_prompt():
    tuned, frozen = tuned_on_features()
    text = tuned.class_features(frozen)
    tuned.set_classes(NAMES[3:])
    torch.testing.assert_close(tuned.class_features(frozen[3:]), text[3:])
    with pytest.raises(ValueError, match=r"text_features: got those of 5 classes; it takes those of the 2 classes"):
        tuned.class_features(frozen)


def test_state_travels_without_the_model():
    tuned, frozen = tuned_on_features()
    model, tokenizer = tuned.encoder.model, Simple()
    assert set(tuned.encoder.prompt.state_dict()) == {"text_context"}
    assert set(PromptLearner(model, tokenizer).state_dict()) == {"text_context", "image_context"}
    again = PromptLearner(model, tokenizer, **tuned.encoder.prompt.options)
    other = PromptedHead(PromptedEncoder(model, again), RAdaHead(16, 4), NAMES)
    other.trained.load_state_dict(tuned.trained.state_dict())
    features = torch.randn(3, 16)
    torch.testing.assert_close(other(features, frozen, 20.0), tuned(features, frozen, 20.0))
    for twin in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        randomize(tuned.encoder.prompt)  # the twin has its own
        torch.testing.assert_close(twin(features, frozen, 20.0), other(features, frozen, 20.0))


def test_the_average_over_epochs_reaches_prompt_and_head():
    tuned, frozen = tuned_on_features()
    averaged = AveragedModel(tuned.trained, avg_fn=gaussian_average(2, mean=1, std=1e-3))
    averaged.update_parameters(tuned.trained)
    first = copy.deepcopy(tuned)
    randomize(tuned.trained)
    averaged.update_parameters(tuned.trained)  # of no weight
    tuned.trained.load_state_dict(averaged.module.state_dict())
    features = torch.randn(3, 16)
    torch.testing.assert_close(tuned(features, frozen, 20.0), first(features, frozen, 20.0))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_autocast(kind):
    model, tokenizer = model_of(kind)
    encoder = PromptedEncoder(model, PromptLearner(model, tokenizer))
    tokens, images = encoder.prompt.tokenize(NAMES), pixels(model)
    exact = encoder.encode_text(tokens), encoder.encode_image(images)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder.encode_text(tokens), encoder.encode_image(images)
    for got, expected in zip(features, exact, strict=True):
        assert F.cosine_similarity(got.float(), expected).min() > 0.999
    head = PromptedHead(encoder, RAdaHead(16, 4), NAMES, regularizer=PromptSRC())
    frozen = model.encode_text(tokens)
    expected = head(images, frozen, 20.0, -3.0, return_penalty=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(images, frozen, 20.0, -3.0, return_penalty=True)
    torch.testing.assert_close(outputs, expected, atol=0.5, rtol=0.05)
    CrossEntropy()(outputs[0], torch.arange(3), *outputs[1:]).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in encoder.prompt.parameters())


def test_half_precision_models_learn_a_float32_prompt():
    model, tokenizer = model_of("clip")
    model = model.bfloat16()
    encoder = PromptedEncoder(model, PromptLearner(model, tokenizer))
    assert {p.dtype for p in encoder.prompt.parameters()} == {torch.float32}
    assert encoder.encode_text(encoder.prompt.tokenize(NAMES)).dtype == torch.bfloat16
    assert encoder.encode_image(pixels(model, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_sizes_and_starts():
    model, tokenizer = model_of("clip", 12)
    prompt = PromptLearner(model, tokenizer, text_tokens=3, image_tokens=4)
    assert prompt.options == {"context": "a photo of a", "text_tokens": 3, "image_tokens": 4, "depth": 9}
    assert prompt.text_context.shape == (9, 3, 32)
    assert prompt.image_context.shape == (9, 4, 32)
    words = model.token_embedding(tokenizer(["a photo of"]))[0, 1:4]
    torch.testing.assert_close(prompt.text_context[0], words)
    assert prompt.image_context.std().item() == pytest.approx(0.02, rel=0.1)
    assert len(PromptLearner(*model_of("clip")).text_context) == 3  # a tower of three layers


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("clip", {"text_tokens": 5}, r"text_tokens: got 5; it takes 1..4, the tokens of 'a photo of a'"),
        ("clip", {"text_tokens": 0}, r"text_tokens: got 0; it takes 1..4"),
        ("clip", {"context": "a"}, r"text_tokens: got 2; it takes 1..1, the tokens of 'a'"),
        ("clip", {"context": ""}, r"context: got ''; it takes words that the tokenizer puts at the start of a text"),
        ("clip", {"depth": 4}, r"depth: got 4; it takes 1..3, the layers of the shallower tower"),
        ("clip", {"depth": 0}, r"depth: got 0; it takes 1..3"),
        ("clip", {"image_tokens": -1}, r"image_tokens: got -1; it takes an int of at least 0"),
        ("resnet", {}, r"image_tokens: got the image tower ModifiedResNet, which takes no tokens; it takes 0"),
    ],
)
def test_wrong_options_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        PromptLearner(*model_of(kind), **options)


def test_texts_without_the_context_are_refused():
    model, tokenizer = model_of("clip")
    encoder = PromptedEncoder(model, PromptLearner(model, tokenizer))
    with pytest.raises(
        ValueError, match=r"tokens: got a text without 'a photo of a' at its start; it takes texts that begin so"
    ):
        encoder.encode_text(tokenizer(["a drawing of a fox."]))


def test_features_without_the_image_tokens_are_refused():
    model, tokenizer = model_of("clip")
    tuned = PromptedHead(PromptedEncoder(model, PromptLearner(model, tokenizer)), RAdaHead(16, 4), NAMES)
    with pytest.raises(ValueError, match=r"images: got \[3, 16\]; it takes images \[B, 3, H, W\]"):
        tuned(torch.randn(3, 16), torch.randn(5, 16), 20.0)


def test_a_tokenizer_that_pads_on_the_left_is_refused():
    model, tokenizer = model_of("clip")

    def left(texts):
        rows = [[i for i in row if i] for row in tokenizer(texts).tolist()]
        return torch.tensor([[0] * (12 - len(row)) + row for row in rows])

    with pytest.raises(ValueError, match=r"context: got 'a photo of a'; it takes words that the tokenizer puts at the"):
        PromptLearner(model, left)
