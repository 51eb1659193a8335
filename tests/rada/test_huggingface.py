"""HuggingFaceEncoder over small transformers models with random weights, written to and read from folders."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import rada.huggingface
from rada import RAdaCLIP, RAdaHead
from rada.huggingface import HuggingFaceEncoder
from rada.losses import CrossEntropy, PromptSRC, SigmoidLoss
from rada.models import ModelSpec
from rada.prompt import PromptedEncoder, PromptedHead, PromptLearner
from rada.tuning.full import FineTuner, FullTuning
from rada.tuning.interpolation import snapshot

transformers = pytest.importorskip("transformers")

NAMES = ("red fox", "sea", "tree", "crane")
TEXTS = [f"a photo of a {name}." for name in NAMES]
LETTERS = [chr(code) for code in range(33, 127)]
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8,
}  # fmt: skip


def clip():
    """CLIP over letters."""
    pieces = [letter + end for letter in LETTERS for end in ("", "</w>")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    end = len(vocabulary) - 1
    text = TEXT | {
        "vocab_size": len(vocabulary), "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config=VISION | {"image_size": 16}, projection_dim=16, logit_scale_init_value=2.5
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    return transformers.CLIPModel(config), transformers.CLIPProcessor(images, tokenizer)


def letters_of_siglip():
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right"), {
        "vocab_size": len(vocabulary), "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "projection_size": 32,
    }  # fmt: skip


def siglip():
    """SigLIP, and SigLIP 2 of fixed resolution."""
    tokenizer, text = letters_of_siglip()
    config = transformers.SiglipConfig(text_config=TEXT | text, vision_config=VISION | {"image_size": 16})
    images = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    return transformers.SiglipModel(config), transformers.SiglipProcessor(images, tokenizer)


def siglip2():
    """SigLIP 2 of any aspect ratio."""
    tokenizer, text = letters_of_siglip()
    config = transformers.Siglip2Config(text_config=TEXT | text, vision_config=VISION | {"num_patches": 4})
    images = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=4)
    return transformers.Siglip2Model(config), transformers.Siglip2Processor(images, tokenizer)


@pytest.fixture(scope="module", params=[clip, siglip, siglip2], ids=lambda make: make.__name__)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    model, processor = request.param()
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-9.0)
    path = tmp_path_factory.mktemp(request.param.__name__)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def encoder(folder):
    return HuggingFaceEncoder.from_pretrained(folder)


def picture(size=(16, 16)) -> Image.Image:
    pixels = torch.randint(0, 256, (*size[::-1], 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_features_and_logits_are_transformers_own(encoder, folder):
    """Padding and patches as the processor makes them; CLIP's texts padded to the longest, and masked, as well."""
    images = [picture(), picture()]
    texts = encoder.processor.tokenizer(
        TEXTS, padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    )
    model, is_clip = transformers.AutoModel.from_pretrained(folder), encoder.logit_bias is None
    if not is_clip:
        texts.pop("attention_mask")  # SigLIP is called without
    inputs = texts | encoder.processor.image_processor(images, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        image = encoder.encode_image(torch.stack([encoder.preprocess(image) for image in images]))
        text = encoder.encode_text(encoder.tokenizer(TEXTS))
        logits = encoder.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        if encoder.logit_bias is not None:
            logits = logits + encoder.logit_bias
        if is_clip:
            longest = encoder.processor(text=TEXTS, padding=True, return_tensors="pt")
            assert longest.input_ids.shape[1] < 32
            torch.testing.assert_close(model.get_text_features(**longest).pooler_output, text)
    torch.testing.assert_close(logits, expected)
    assert is_clip == isinstance(model, transformers.CLIPModel)
    assert encoder.logit_scale.item() == 2.5


@pytest.mark.parametrize(("mode", "size"), [("RGBA", (20, 31)), ("P", (40, 12)), ("L", (16, 16))])
def test_images_of_any_mode_and_size(encoder, mode, size):
    assert encoder.preprocess(picture(size).convert(mode)).shape == (3, 16, 16)


def test_transparency_lies_on_white(encoder):
    clear, white = Image.new("RGBA", (16, 16), (0, 0, 0, 0)), Image.new("RGB", (16, 16), "white")
    torch.testing.assert_close(encoder.preprocess(clear), encoder.preprocess(white))


def test_a_head_trains_on_it(encoder):
    """As on any model of open_clip; SigLIP by its sigmoid loss."""
    rada = RAdaCLIP.from_open_clip(
        encoder, NAMES, tokenizer=encoder.tokenizer, preprocess=encoder.preprocess, num_heads=4, penalty="mse"
    )
    images = torch.stack([rada.preprocess(picture()) for _ in NAMES])
    image, text = encoder.encode_image(images), encoder.encode_text(encoder.tokenizer(TEXTS))
    zero_shot = 2.5 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    with torch.no_grad():
        encoder.logit_scale.copy_(torch.tensor(2.5).log())
    bias = encoder.logit_bias
    torch.testing.assert_close(rada(images), zero_shot if bias is None else zero_shot + bias)
    loss = CrossEntropy() if bias is None else SigmoidLoss()
    optimizer = torch.optim.Adam([p for p in rada.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(8):
        logits, penalty = rada(images, return_penalty=True)
        values.append(loss(logits, torch.arange(4), penalty))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1] < values[0]
    assert all(p.grad is None for p in encoder.parameters())


def test_prompts_enter_its_towers(encoder):
    """A new context gives the plain features; a changed one changes them; off, the towers are as before."""
    images = torch.stack([encoder.preprocess(picture()) for _ in range(2)])
    tokens = encoder.tokenizer(TEXTS)
    with torch.no_grad():
        text, image = encoder.encode_text(tokens), encoder.encode_image(images)
        shallow = PromptLearner(encoder, encoder.tokenizer, image_tokens=0, depth=1)
        torch.testing.assert_close(PromptedEncoder(encoder, shallow).encode_text(tokens), text)
    prompted = PromptedEncoder(encoder, PromptLearner(encoder, encoder.tokenizer))
    with torch.no_grad():
        for parameter in prompted.prompt.parameters():
            parameter.normal_()
    tuned = PromptedHead(prompted, RAdaHead(text.shape[1], 4), NAMES, regularizer=PromptSRC())
    outputs = tuned(images, text, encoder.logit_scale.exp(), encoder.logit_bias, return_penalty=True)
    CrossEntropy()(outputs[0], torch.tensor([1, 3]), *outputs[1:]).backward()
    assert all(p.grad.abs().sum() > 0 for p in prompted.prompt.parameters())
    assert all(p.grad is None for p in encoder.parameters())
    assert not torch.allclose(prompted.encode_text(tokens), text, atol=1e-3)
    assert not torch.allclose(prompted.encode_image(images), image, atol=1e-3)
    torch.testing.assert_close((encoder.encode_text(tokens), encoder.encode_image(images)), (text, image))


def test_gradient_checkpointing_repeats_the_prompt(encoder):
    prompted = PromptedEncoder(encoder, PromptLearner(encoder, encoder.tokenizer))
    tokens = encoder.tokenizer(TEXTS)
    images = torch.stack([encoder.preprocess(picture()) for _ in range(2)])

    def gradients():
        loss = prompted.encode_text(tokens).square().sum() + prompted.encode_image(images).square().sum()
        return torch.autograd.grad(loss, list(prompted.prompt.parameters()))

    expected = gradients()
    encoder.set_grad_checkpointing()
    encoder.train()  # transformers checkpoints in training alone
    torch.testing.assert_close(gradients(), expected)


def test_full_fine_tuning(encoder):
    """Random crops come before the processor, which finds images of the tower's size."""
    images = [picture() for _ in range(4)]
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = RAdaCLIP.from_open_clip(
            copy.deepcopy(encoder), NAMES, tokenizer=encoder.tokenizer, preprocess=encoder.preprocess, freeze=False
        )
        tuning = FullTuning(epochs=1, batch_size=4, lr=1e-2, checkpoint_activations=checkpointed)
        before = snapshot(model)
        tuner = FineTuner(model, images, torch.arange(4) % len(NAMES), tuning)
        size = encoder.visual.image_size
        assert tuner.data[0, 1][0].shape == (3, size, size)
        tuner.run()
        gradients.append({name: p.detach() - before[name] for name, p in model.named_parameters() if name in before})
    moved = {name.split(".")[1] for name, change in gradients[0].items() if change.any()}
    assert {"visual", "text"} <= moved
    for name, change in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], change, rtol=1e-3, atol=1e-5, msg=name)


def test_half_precision(folder):
    encoder = HuggingFaceEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert encoder.encode_text(encoder.tokenizer(TEXTS)).dtype == torch.bfloat16
    assert encoder.encode_image(encoder.preprocess(picture())[None]).dtype == torch.bfloat16


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_it_opens_by_name(encoder, folder, precision, dtype):
    """As --model transformers:NAME does."""
    spec = ModelSpec(f"transformers:{folder}")
    opened = spec.open(torch.device("cpu"), precision)
    assert (opened.spec, opened.backbone) == (spec, str(folder))
    assert opened.model.encode_image(opened.preprocess(picture())[None].to(dtype)).dtype == dtype
    assert opened.model.logit_scale.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    with torch.no_grad():
        text = F.normalize(encoder.encode_text(encoder.tokenizer(TEXTS)), dim=-1)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(opened.classes(NAMES).text, text, **tolerance)
    with pytest.raises(ValueError, match="pretrained: got 'laion'; the model 'transformers:"):
        ModelSpec(spec.name, "laion").open(torch.device("cpu"))


def test_the_encoder_of_ones_own_in_the_docstring():
    """It runs as it stands there."""
    source = re.search(r"    class MyEncoder.*?(?=\nIts tokenizer)", rada.huggingface.__doc__, re.DOTALL)[0]
    scope = {"torch": torch, "nn": torch.nn}
    exec("if True:\n" + source, scope)
    encoder = scope["MyEncoder"]()

    def tokenizer(texts):
        return torch.tensor([list(text.encode().ljust(32)) for text in texts])

    tuned = RAdaCLIP.from_open_clip(encoder, NAMES, tokenizer=tokenizer, num_heads=4)
    images = torch.randn(2, 3, 8, 8)
    image, text = encoder.encode_image(images), encoder.encode_text(tokenizer(TEXTS))
    torch.testing.assert_close(tuned(images), 100 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T)


def test_wrong_models_are_named():
    with pytest.raises(
        ValueError, match=r"model: got Linear; it takes transformers' CLIPModel, SiglipModel or Siglip2"
    ):
        HuggingFaceEncoder(torch.nn.Linear(1, 1))
    encoder = HuggingFaceEncoder(clip()[0])
    with pytest.raises(ValueError, match=r"processor: got None; tokenizer takes the model's processor"):
        encoder.tokenizer(TEXTS)
    with pytest.raises(ValueError, match=r"processor: got None; image_processor takes the model's processor"):
        encoder.preprocess(picture())
    with pytest.raises(ValueError, match=r"model: transformers:/no/such/model cannot be opened: "):
        ModelSpec("transformers:/no/such/model").open(torch.device("cpu"))
