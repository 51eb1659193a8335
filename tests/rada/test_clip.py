"""RAdaCLIP over small open_clip models of every architecture class."""

from __future__ import annotations

import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.factory import _MODEL_CONFIG_PATHS, _rescan_model_configs
from safetensors.torch import save_file

from rada import RAdaCLIP, load_head, save_head
from rada.templates import check_templates, fill

NAMES = ("red fox", "sea {deep}", "tree", "crane", "kite")
TEMPLATES = ("a photo of a {}.", "{class}, drawn")
VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = TEXT | {"vocab_size": 600, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
SIGLIP_VISION = {
    "timm_model_name": "vit_tiny_patch16_224",
    "timm_pool": "map",
    "timm_proj": "none",
    "image_size": 224,
}


class Letters:
    """A tokenizer for a small vocabulary: UTF-8 bytes, as SigLIP's text tower takes them, padded with 0."""

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [list(text.encode())[:12] for text in texts]
        return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


def build(kind: str):
    """A small open_clip model with random weights, and its tokenizer where it is not CLIP's."""
    if kind == "clip":
        return open_clip.CLIP(16, VISION, TEXT), None
    if kind == "resnet":
        vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None, "image_size": 32}
        return open_clip.CLIP(16, vision, TEXT), None
    if kind == "siglip":
        model = open_clip.CustomTextCLIP(
            16, VISION, SIGLIP_TEXT, init_logit_scale=2.3, init_logit_bias=-10.0, nonscalar_logit_scale=True
        )
        return model, Letters()
    vision = VISION | {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2}
    decoder = {"width": 32, "context_length": 12, "vocab_size": 49408, "layers": 1, "heads": 2}
    return open_clip.CoCa(16, decoder, TEXT | {"embed_cls": True, "output_tokens": True}, vision), None


def clip(kind: str = "clip", **options) -> RAdaCLIP:
    model, tokenizer = build(kind)
    options = {"templates": TEMPLATES, "num_heads": 4, "tokenizer": tokenizer} | options
    return RAdaCLIP.from_open_clip(model, NAMES, **options)


def pixels(rada: RAdaCLIP, count: int = 3) -> torch.Tensor:
    size = rada.model.visual.image_size
    return torch.randn(count, 3, *((size, size) if isinstance(size, int) else size))


def train_a_step(rada: RAdaCLIP, images: torch.Tensor) -> None:
    parameters = [p for p in rada.parameters() if p.requires_grad]
    logits, penalty = rada(images, return_penalty=True)
    labels = torch.arange(len(images)) % len(rada.class_names)
    (F.cross_entropy(logits, labels) + penalty).backward()
    torch.optim.SGD(parameters, lr=0.5).step()


@pytest.fixture(params=["clip", "resnet", "siglip", "coca"])
def rada(request):
    return clip(request.param)


def test_features_and_zero_shot_are_open_clips_own(rada):
    images, model = pixels(rada), rada.model
    rows = []
    with torch.no_grad():
        for name in NAMES:
            tokens = rada.tokenizer([f"a photo of a {name}.", f"{name}, drawn"])
            rows.append(F.normalize(model.encode_text(tokens, normalize=True).mean(0), dim=-1))
        text = torch.stack(rows)
        image = model.encode_image(images, normalize=True)
        logits = model.logit_scale.exp() * image @ text.T
        if model.logit_bias is not None:
            logits = logits + model.logit_bias
    torch.testing.assert_close(rada.text_features, text)
    torch.testing.assert_close(rada.encode_images(images), image)
    torch.testing.assert_close(rada.zero_shot(images), logits, atol=1e-4, rtol=1e-5)


def test_an_untrained_head_gives_the_zero_shot_logits_and_training_moves_them(rada):
    images = pixels(rada)
    before = rada.zero_shot(images)
    torch.testing.assert_close(rada(images), before, atol=1e-4, rtol=1e-5)
    train_a_step(rada, images)
    torch.testing.assert_close(rada.zero_shot(images), before)  # the model is frozen
    assert not torch.allclose(rada(images), before, atol=1e-3)


def test_a_frozen_model_gets_no_gradients_and_stays_in_eval_mode(rada):
    rada.train()
    assert rada.training
    assert rada.head.training
    assert not any(module.training for module in rada.model.modules())
    before = {name: tensor.clone() for name, tensor in rada.model.state_dict().items()}
    train_a_step(rada, pixels(rada))
    for (
        name,
        tensor,
    ) in rada.model.state_dict().items():  # CoCa's caption decoder leaves some memory as it was
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert {name.partition(".")[0] for name, p in rada.named_parameters() if p.requires_grad} == {"head"}


def test_every_parameter_that_requires_a_gradient_gets_one(rada):
    """What DistributedDataParallel asks for, with frozen encoders and with trained ones."""
    rada.model.requires_grad_(True)
    if hasattr(rada.model, "text_decoder"):
        rada.model.text_decoder.requires_grad_(False)
    for trained in (rada.train(), clip("coca", freeze=False)):
        logits, penalty = trained(pixels(trained), return_penalty=True)
        (logits.square().sum() + penalty).backward()
        assert [name for name, p in trained.named_parameters() if p.requires_grad and p.grad is None] == []


def test_state_dict_is_the_head_alone_while_the_model_is_frozen(rada):
    assert set(rada.state_dict()) == {f"head.{name}" for name in rada.head.state_dict()}
    train_a_step(rada, pixels(rada))
    other = copy.deepcopy(rada)
    with torch.no_grad():
        for parameter in other.head.parameters():
            parameter.add_(1)
    other.load_state_dict(rada.state_dict(), strict=True)
    images = pixels(rada)
    torch.testing.assert_close(other(images), rada(images))
    state = rada.state_dict()
    del state["head.k_proj.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head.k_proj.bias"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*head.extra"):
        other.load_state_dict(rada.state_dict() | {"head.extra": torch.zeros(1)})


def test_state_dict_is_whole_once_the_model_trains():
    rada = clip()
    rada.model.visual.requires_grad_(True)
    assert {f"model.{name}" for name in rada.model.state_dict()} < set(rada.state_dict())
    frozen = clip()  # other random weights
    images = pixels(rada)
    assert not torch.allclose(frozen(images), rada(images))
    frozen.load_state_dict(rada.state_dict())
    torch.testing.assert_close(frozen(images), rada(images))  # text features were encoded again, too
    with pytest.raises(RuntimeError, match=r"Missing key.*model\."):
        rada.load_state_dict(clip().state_dict())


def test_state_dict_hooks_know_their_prefix():
    nested = torch.nn.Sequential(clip(), torch.nn.Linear(2, 2))
    state = nested.state_dict()
    assert {key.split(".")[0] for key in state} == {"0", "1"}
    assert not any(key.startswith("0.model.") for key in state)
    nested.load_state_dict(state, strict=True)


def test_text_features_are_kept_while_the_text_tower_is_frozen(monkeypatch):
    rada = clip()
    calls = []
    encode = rada.model.encode_text
    monkeypatch.setattr(rada.model, "encode_text", lambda tokens: calls.append(1) or encode(tokens))
    first = rada.text_features
    rada(pixels(rada))
    assert torch.equal(first, rada.text_features)
    assert not calls
    rada.model.visual.requires_grad_(True)  # the image tower has no part in them
    rada(pixels(rada))
    assert not calls
    rada.model.transformer.requires_grad_(True)
    rada(pixels(rada))
    assert len(calls) == 1


def test_a_text_tower_that_trains_is_encoded_anew():
    rada = clip(freeze=False)
    rada.train()
    assert rada.model.transformer.training
    before = rada.text_features
    assert before.requires_grad
    train_a_step(rada, pixels(rada))
    trained = rada.text_features
    assert not torch.allclose(before, trained, atol=1e-4)
    rada.model.requires_grad_(False)  # frozen after training: what is kept is the trained tower's
    assert not rada.text_features.requires_grad
    torch.testing.assert_close(rada.text_features, trained.detach())


def test_one_tower_may_train_alone():
    rada = clip()
    rada.model.visual.requires_grad_(True)
    rada.train()
    assert rada.model.visual.training
    assert not rada.model.transformer.training
    rada(pixels(rada)).sum().backward()
    assert rada.model.visual.conv1.weight.grad is not None
    assert rada.model.token_embedding.weight.grad is None
    rada.eval()
    assert not any(module.training for module in rada.modules())


def test_new_classes_under_the_same_head(rada):
    images = pixels(rada)
    train_a_step(rada, images)
    head = {name: tensor.clone() for name, tensor in rada.head.state_dict().items()}
    text = rada.text_features
    rada.set_classes(NAMES[2:])
    assert rada.class_names == NAMES[2:]
    torch.testing.assert_close(rada.text_features, text[2:])
    assert rada(images).shape == (3, 3)
    assert all(torch.equal(head[name], tensor) for name, tensor in rada.head.state_dict().items())


def test_many_prompts_are_encoded_in_batches(monkeypatch):
    rada = clip()
    whole = rada.text_features
    sizes = []
    encode = rada.model.encode_text
    monkeypatch.setattr(rada.model, "encode_text", lambda tokens: sizes.append(len(tokens)) or encode(tokens))
    monkeypatch.setattr("rada.encoders.PROMPTS_PER_BATCH", 4)
    rada.set_classes(NAMES)
    assert sizes == [4, 4, 2]  # two templates of two classes at a time
    torch.testing.assert_close(rada.text_features, whole)


def test_kept_text_features_do_not_depend_on_who_asked_first():
    rada = clip()
    expected = rada.text_features
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        rada.set_classes(NAMES)
        rada(pixels(rada))
    assert torch.equal(rada.text_features, expected)
    train_a_step(rada, pixels(rada))  # an inference tensor could not be saved for backward


def test_autocast_and_half_precision_models():
    rada = clip()
    images = pixels(rada)
    exact = rada(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits, penalty = rada(images, return_penalty=True)
    assert logits.dtype == penalty.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=0.5, rtol=0.05)
    assert rada.to(torch.bfloat16)(images).dtype == torch.bfloat16
    assert rada.text_features.dtype == torch.bfloat16


def test_siglips_bias_reaches_the_logits():
    rada = clip("siglip")
    images = pixels(rada)
    assert rada.logit_bias.shape == rada.logit_scale.shape == ()
    assert rada.logit_bias.item() == -10.0
    assert rada.logit_scale.item() == pytest.approx(torch.tensor(2.3).exp().item())
    cosines = rada.encode_images(images) @ rada.text_features.T
    torch.testing.assert_close(rada(images), rada.logit_scale * cosines - 10, atol=1e-4, rtol=1e-5)


def test_a_timm_tower_works():
    model = open_clip.CustomTextCLIP(192, SIGLIP_VISION, SIGLIP_TEXT, init_logit_bias=-10.0)
    rada = RAdaCLIP.from_open_clip(model, NAMES[:2], tokenizer=Letters())
    assert rada.head.embed_dim == 192
    assert rada(pixels(rada, 1)).shape == (1, 2)


def test_head_options_reach_the_head():
    rada = clip(temperature=0.5, queries=("text",), penalty="mse", backend="reference", dtype=torch.float64)
    assert rada.head.options.queries == ("text",)
    assert rada.head.options.penalty == "mse"
    assert rada.head.backend == "reference"
    assert rada(pixels(rada)).dtype == torch.float64


def test_a_head_travels_through_a_checkpoint(tmp_path):
    rada = clip()
    images = pixels(rada)
    train_a_step(rada, images)
    save_head(tmp_path, rada.head, backbone=rada.backbone, class_names=rada.class_names)
    expected = rada(images)
    rada.head = load_head(tmp_path, backbone="CLIP", embed_dim=16, num_heads=4)
    torch.testing.assert_close(rada(images), expected)


@pytest.fixture
def named_model(tmp_path):
    """A model that open_clip knows by the name tiny-vit, and a checkpoint of it."""
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "tiny-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-vit.json")
    model = open_clip.CLIP(16, VISION, TEXT)
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    yield model, path
    _MODEL_CONFIG_PATHS.pop()
    del open_clip.factory._MODEL_CONFIGS["tiny-vit"]
    _rescan_model_configs()


def test_a_model_by_name_with_a_local_checkpoint(named_model):
    model, path = named_model
    by_name = RAdaCLIP.from_open_clip("tiny-vit", NAMES, pretrained=path, templates=TEMPLATES, num_heads=4)
    by_object = RAdaCLIP.from_open_clip(model, NAMES, templates=TEMPLATES, num_heads=4)
    images = pixels(by_name)
    torch.testing.assert_close(by_name.zero_shot(images), by_object.zero_shot(images))
    assert by_name.backbone == "tiny-vit/weights.safetensors"
    from PIL import Image

    batch = by_name.preprocess(Image.new("RGB", (40, 30), (9, 99, 199))).unsqueeze(0)
    assert by_name(batch).shape == (1, 5)


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_precision_is_the_models_and_not_the_heads(named_model, precision):
    rada = RAdaCLIP.from_open_clip("tiny-vit", NAMES, pretrained=named_model[1], precision=precision, num_heads=4)
    images = pixels(rada)
    assert rada.model.visual.conv1.weight.dtype == torch.bfloat16
    assert rada.head.k_proj.weight.dtype == torch.float32
    assert rada.encode_images(images).dtype == rada.text_features.dtype == rada(images).dtype == torch.float32


def test_random_weights_are_announced(named_model):
    with pytest.warns(UserWarning, match=r"pretrained: got None, so tiny-vit has random weights"):
        RAdaCLIP.from_open_clip("tiny-vit", NAMES, num_heads=4)


def test_checkpoints_that_do_not_fit(named_model, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"visual.conv1.weight": torch.zeros(1)}, other)
    (tmp_path / "bad.pt").write_bytes(b"x")
    for path in (other, tmp_path / "bad.pt"):
        with pytest.raises(ValueError, match=rf"pretrained: .*{path.name} does not fit the model tiny-vit"):
            RAdaCLIP.from_open_clip("tiny-vit", NAMES, pretrained=path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit-b16", {}, r"model_or_name: got 'vit-b16'; the nearest are \[.*'ViT-B-16'"),
        ("@@@@", {}, r"model_or_name: got '@@@@'; it takes one of open_clip.list_models\(\)"),
        ("ViT-B-32", {"pretrained": "openia"}, r"pretrained: got 'openia', .*one of \['openai', "),
        ("ViT-B-32", {"precision": "half"}, r"precision: got 'half'; it takes one of"),
        (
            "local-dir:x",
            {"pretrained": "y"},
            r"pretrained: got 'y'; with 'local-dir:x' the weights come from",
        ),
    ],
)
def test_bad_names(name, options, message):
    with pytest.raises(ValueError, match=message):
        RAdaCLIP.from_open_clip(name, NAMES, **options)


def test_arguments_that_only_go_with_a_name():
    with pytest.raises(ValueError, match=r"pretrained: got 'openai' with a model given as an object"):
        clip(pretrained="openai")
    with pytest.raises(ValueError, match=r"precision: got 'bf16' with a model given as an object"):
        clip(precision="bf16")


def test_towers_must_agree():
    model = open_clip.CLIP(16, VISION, TEXT)
    model.text_projection = torch.nn.Parameter(torch.randn(32, 24))
    with pytest.raises(ValueError, match=r"text features of width 24 but image features of width 16"):
        RAdaCLIP.from_open_clip(model, NAMES, num_heads=4)
    with pytest.raises(ValueError, match=r"num_heads: got 5; it takes a divisor of embed_dim 16"):
        clip(num_heads=5)


def test_a_tokenizer_of_another_model_is_noticed():
    model, _ = build("siglip")
    with pytest.raises(ValueError, match=r"tokenizer: got None with a model whose vocabulary is not CLIP's"):
        RAdaCLIP.from_open_clip(model, NAMES, num_heads=4)
    with pytest.raises(ValueError, match=r"tokenizer: got token id 49407; the model takes ids below 600"):
        RAdaCLIP.from_open_clip(model, NAMES, num_heads=4, tokenizer=open_clip.SimpleTokenizer())


@pytest.mark.parametrize(
    ("names", "error"), [("cat", TypeError), ([], ValueError), (["a", " "], ValueError), ([3], ValueError)]
)
def test_bad_class_names(names, error):
    with pytest.raises(error, match=r"class_names: got "):
        RAdaCLIP.from_open_clip(build("clip")[0], names)


@pytest.mark.parametrize(
    ("images", "error"),
    [
        ("cat.png", TypeError),
        (torch.zeros(3, 16, 16), ValueError),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ValueError),
    ],
)
def test_bad_images(images, error):
    with pytest.raises(error, match=r"images: got .*\[B, 3, H, W\]"):
        clip()(images)


def test_templates_are_filled():
    assert check_templates("a {}.") == ("a {}.",)
    assert fill("a {class} is a {class}", "b{}") == "a b{} is a b{}"
    assert fill("{{{}}}", "c") == "{c}"


@pytest.mark.parametrize(
    ("templates", "error"),
    [
        ([], ValueError),
        (["a photo"], ValueError),
        (["{} {}"], ValueError),
        (["{0}"], ValueError),
        (["{name}"], ValueError),
        (["{class.x}"], ValueError),
        (["{"], ValueError),
        ([lambda name: name], TypeError),
    ],
)
def test_bad_templates(templates, error):
    with pytest.raises(error, match="templates: got "):
        clip(templates=templates)
