"""Encoders without a head: open_clip's, and a user's own."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rada import RAdaCLIP
from rada.data import Split
from rada.encoders import FeatureExtractor, encode_batches, in_batches, split_features
from rada.models import open_model

NAMES = ("red fox", "tree", "kite")
WIDTH = 16


class OwnEncoder(nn.Module):
    """An image tower and a bag of letters, by the members of `rada.encoders.Encoder`; without a bias."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, WIDTH), nn.BatchNorm1d(WIDTH))
        self.visual.image_size = 4
        self.letters = nn.EmbeddingBag(256, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, image):
        return self.visual(image)

    def encode_text(self, text):
        return self.letters(text)


def tokenize(texts):
    return torch.tensor([list(text.encode().ljust(40)) for text in texts])


@pytest.fixture
def own():
    model = OwnEncoder().requires_grad_(False)
    return FeatureExtractor(model, tokenizer=tokenize, preprocess=lambda image: image, templates=("a {}", "{}"))


def test_open_clips_features_need_no_head():
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model, images = open_clip.CLIP(WIDTH, vision, text), torch.randn(2, 3, 16, 16)
    encoders = open_model(model)
    clip = RAdaCLIP.from_open_clip(model, NAMES, num_heads=4)
    classes = encoders.classes(NAMES)
    assert torch.equal(classes.text, clip.text_features)
    assert classes.logit_scale == float(clip.logit_scale)
    assert classes.logit_bias is None
    assert torch.equal(encoders.encode_images(images), clip.encode_images(images))
    torch.testing.assert_close(classes.zero_shot(encoders.encode_images(images)), clip.zero_shot(images))
    assert encoders.embed_dim == WIDTH
    assert not any(p.requires_grad for p in encoders.parameters())


def test_an_encoder_of_ones_own_works(own):
    classes = own.classes(NAMES)
    letters = own.model.letters
    unit = [F.normalize(letters(tokenize([f"a {name}", name])), dim=-1).mean(0) for name in NAMES]
    torch.testing.assert_close(classes.text, F.normalize(torch.stack(unit), dim=-1))
    assert classes.logit_scale == pytest.approx(torch.tensor(3.0).exp().item())
    assert (classes.logit_bias, own.logit_bias, own.embed_dim) == (None, None, WIDTH)
    assert own.backbone == "OwnEncoder"


def test_finding_the_width_leaves_the_model_as_it_is(own):
    own.model.requires_grad_(True)
    own.train()
    before = {name: tensor.clone() for name, tensor in own.model.state_dict().items()}
    assert own.embed_dim == WIDTH
    assert all(module.training for module in own.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in own.model.state_dict().items())


def test_batches_follow_the_indices(own):
    images = list(torch.randn(7, 3, 4, 4))
    expected = own.encode_images(torch.stack(images))
    indices = torch.tensor([6, 0, 3, 3, 1])
    batches = [batch.features for batch in encode_batches(own, images, in_batches(indices.tolist(), 2), quiet=True)]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(batches), expected[indices])
    split = Split(labels=torch.zeros(7, dtype=torch.int64), images=images)
    torch.testing.assert_close(split_features(own, split, indices, "encode"), expected[indices])
    with pytest.raises(ValueError, match="extractor: got None for a split without features"):
        split_features(None, split, indices, "encode")


class Failing:
    """Nine images, decoded when indexed; two of them fail, as a decoder does and as a disk does."""

    def __init__(self):
        self.decoded = []

    def __len__(self):
        return 9

    def __getitem__(self, index):
        self.decoded.append(index)
        if index == 4:
            raise ValueError("cat.jpg: not a readable image")
        if index == 5:
            raise OSError("no longer there")
        return torch.full((3, 4, 4), float(index))


BAD = {4: "cat.jpg: not a readable image", 5: "OSError: no longer there"}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_recorded(own, workers):
    own.workers = workers
    found = list(encode_batches(own, Failing(), in_batches(range(1, 9), 2), quiet=True))
    assert [batch.rows for batch in found] == [[1, 2], [3], [6], [7, 8]]
    assert [batch.bad for batch in found] == [{}, {4: BAD[4]}, {5: BAD[5]}, {}]
    for batch in found:
        images = torch.stack([torch.full((3, 4, 4), float(row)) for row in batch.rows])
        torch.testing.assert_close(batch.features, own.encode_images(images))


def test_a_batch_of_bad_images_has_features_of_no_row(own):
    (batch,) = encode_batches(own, Failing(), [[4, 5]], quiet=True)
    assert (batch.rows, batch.bad) == ([], BAD)
    assert batch.features.shape == (0, WIDTH)


def test_images_are_decoded_when_their_batch_is_asked_for(own):
    images = Failing()
    batches = encode_batches(own, images, in_batches(range(9), 2), quiet=True)
    assert images.decoded == []
    next(batches)
    assert images.decoded == [0, 1]


def test_features_alone_take_no_bad_image(own):
    split = Split(labels=torch.zeros(9, dtype=torch.int64), images=Failing())
    with pytest.raises(ValueError, match="images: OSError: no longer there; skip_bad"):
        split_features(own, split, torch.tensor([0, 5, 4]), "encode")


def test_a_missing_package_is_no_bad_image(own):
    def preprocess(image):
        raise ImportError("no pillow")

    own.preprocess = preprocess
    with pytest.raises(ImportError, match="no pillow"):
        next(encode_batches(own, Failing(), [[0]], quiet=True))


def test_images_without_a_transform_are_refused(own):
    own.preprocess = None
    with pytest.raises(ValueError, match="it came without an image transform"):
        next(encode_batches(own, [torch.zeros(3, 4, 4)], [[0]]))
