"""The small open_clip model of the demo: it loads, knows its source, and carries over to the target."""

from __future__ import annotations

import argparse
import gzip

import open_clip
import pytest
import torch

import rada.demo as demo
from rada.data.emoji import emoji_classes, load_emoji
from rada.demo import CHECKPOINT, MODEL_DIR, VOCABULARY, load_demo_model, pretrain
from rada.demo.drawings import SHARES
from rada.demo.pretrain import augment, dilated, multi_positive, texts, warp
from rada.demo.vocabulary import learn_merges, write_merges
from rada.demo.words import keywords


@pytest.fixture(scope="module")
def loaded():
    return load_demo_model()


@pytest.fixture(scope="module")
def text_features(loaded):
    model, _, tokenizer = loaded
    names = load_emoji().class_names
    with torch.no_grad():
        return model.encode_text(tokenizer([f"a photo of a {name}." for name in names]), normalize=True)


def accuracy(loaded, text_features, domain: str, split: str) -> float:
    """Top-1 among all classes, of one view of every fifth class."""
    model, preprocess, _ = loaded
    data = getattr(load_emoji(domain, train_views=1, test_views=1), split)
    labels = data.labels[::5]
    images = torch.stack([preprocess(data.images[int(label)]) for label in labels])
    with torch.no_grad():
        features = model.encode_image(images, normalize=True)
    return (features @ text_features.T).argmax(1).eq(labels).float().mean().item()


def test_model_is_open_clips_own(loaded):
    model, preprocess, tokenizer = loaded
    assert type(model) is open_clip.model.CLIP
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < 4_000_000
    assert 10 < model.logit_scale.exp().item() <= 100.001
    image = load_emoji().test.images[0]
    assert preprocess(image).shape == (3, 64, 64)
    tokens = tokenizer(["a photo of a pizza.", "pizza"])
    assert tokens.shape == (2, model.context_length)
    assert tokens.dtype == torch.int64
    assert tokens.max() < model.vocab_size == len(tokenizer.encoder)


def test_checkpoint_is_small():
    assert CHECKPOINT.stat().st_size < 8_000_000


def test_open_clip_loads_the_folder_by_itself(loaded):
    model, _, _ = loaded
    other = open_clip.create_model(f"local-dir:{MODEL_DIR}")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name]), name


def test_no_class_name_is_cut_and_no_two_are_alike(loaded):
    _, _, tokenizer = loaded
    names = load_emoji().class_names
    tokens = tokenizer([f"a photo of a {name}." for name in names])
    longest = max(len(tokenizer.encode(f"a photo of a {name}.")) + 2 for name in names)
    assert longest <= tokens.shape[1]
    assert len(torch.unique(tokens, dim=0)) == len(names)


def test_zero_shot_on_the_source(loaded, text_features):
    assert accuracy(loaded, text_features, "source", "test") > 0.5


def test_zero_shot_on_the_target_is_far_above_chance_and_leaves_room(loaded, text_features):
    assert 0.3 < accuracy(loaded, text_features, "target", "test") < 0.8


def test_the_text_tower_knows_what_is_related(text_features):
    """Among all names the nearest neighbour of most names is one that shares a keyword."""
    words = keywords(emoji_classes())
    cosine = (text_features @ text_features.T).fill_diagonal_(-1)
    related = [bool(set(words[i]) & set(words[j])) for i, j in enumerate(cosine.argmax(1).tolist())]
    assert sum(related) / len(related) > 0.5


def test_random_weights_know_nothing(text_features):
    torch.manual_seed(0)
    untrained = load_demo_model(pretrained=False)
    assert accuracy(untrained, text_features, "source", "test") < 0.05


@pytest.mark.parametrize("missing", ["CHECKPOINT", "VOCABULARY"])
def test_a_missing_file_names_its_command(monkeypatch, tmp_path, missing):
    monkeypatch.setattr(demo, missing, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing.*python -m rada\.demo\.pretrain"):
        load_demo_model()


def test_vocabulary_is_the_one_its_script_makes(tmp_path):
    classes = emoji_classes()
    spoken = texts([emoji.name for emoji in classes], keywords(classes))
    count = len(gzip.decompress(VOCABULARY.read_bytes()).decode().splitlines()) - 1
    write_merges(learn_merges(spoken, count), tmp_path / "bpe.txt.gz")
    assert gzip.decompress((tmp_path / "bpe.txt.gz").read_bytes()) == gzip.decompress(VOCABULARY.read_bytes())


def test_merges_of_a_small_text():
    assert learn_merges(["lower lowest lot"], 2) == [("l", "o"), ("lo", "w")]
    with pytest.raises(ValueError, match="count: got 50; it takes at most 2"):
        learn_merges(["abc"], 50)


def test_multi_positive_is_cross_entropy_averaged_over_the_positives():
    logits = torch.randn(3, 5, dtype=torch.float64)
    positive = torch.zeros(3, 5, dtype=torch.float64)
    positive[0, 2] = positive[1, 0] = positive[1, 4] = 1.0  # the third row has none
    nll = torch.nn.functional.cross_entropy
    one, two, other = (nll(logits[[row]], torch.tensor([label])) for row, label in ((0, 2), (1, 0), (1, 4)))
    torch.testing.assert_close(multi_positive(logits, positive), (one + (two + other) / 2) / 3)


def test_the_towers_learn_one_after_the_other(monkeypatch):
    """A few steps on eight classes: the text tower nears its aims, then the image tower moves and the text stays."""
    monkeypatch.setattr(pretrain, "TEXT_STEPS", 12)
    monkeypatch.setattr(pretrain, "TEXT_NAMES", 8)
    monkeypatch.setattr(pretrain, "TEXT_KEYWORDS", 2)
    torch.manual_seed(0)
    model, _, tokenizer = load_demo_model(pretrained=False)
    names, words = ("cat", "dog", "pizza", "taco", "car", "bus", "rose", "tulip"), ("animal", "food")
    captions, hints = (
        torch.stack([tokenizer([t.format(name) for name in spoken]) for t in pretrain.TEMPLATES])
        for spoken in (names, words)
    )
    member = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]])
    aims = torch.nn.functional.normalize(torch.randn(8, 128), dim=1)
    rng = torch.Generator().manual_seed(0)
    before = (model.encode_text(captions[0], normalize=True) * aims).sum(1).mean().item()
    text, keyword_text = pretrain.pretrain_text(model, captions, hints, member, aims, rng, bf16=False)
    assert (text[0] * aims).sum(1).mean().item() > before + 0.2
    assert text.shape == (len(pretrain.TEMPLATES), 8, 128)
    assert keyword_text.shape == (len(pretrain.TEMPLATES), 2, 128)

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawings = torch.randint(0, 256, (8, len(SHARES), 3, 128, 128), dtype=torch.uint8)
    args = argparse.Namespace(batch_size=4, epochs=1, lr=1e-3, weight_decay=0.05, bf16=False)
    pretrain.pretrain_image(model, drawings, text, keyword_text, member, rng, args)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert "visual.conv1.weight" in changed
    assert all(name.startswith("visual.") or name == "logit_scale" for name in changed)
    assert not model.training


class TestAugmentation:
    def drawings(self):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(8, 3, 64, 64, generator=generator)

    def test_shape_range_and_seed(self):
        first, again, other = (augment(self.drawings(), 32, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert first.shape == (8, 3, 32, 32)
        assert first.min() >= -1e-5
        assert first.max() <= 1 + 1e-5
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_strength_zero_keeps_the_geometry(self):
        ink = self.drawings()
        kept = warp(ink, 64, torch.Generator().manual_seed(0), strength=0.0)
        torch.testing.assert_close(kept, ink, atol=1e-4, rtol=0)

    def test_dilated_is_the_largest_neighbour(self):
        x = torch.randn(2, 3, 9, 7)
        torch.testing.assert_close(dilated(x), torch.nn.functional.max_pool2d(x, 3, 1, 1), atol=0, rtol=0)
