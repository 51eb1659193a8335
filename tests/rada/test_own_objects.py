"""Sources, encoders, losses and loops of one's own: trained on, saved, evaluated."""

from __future__ import annotations

import pytest
import torch

import rada
from rada.data import Source, Split, load_source
from rada.data.classes import prompt_names
from rada.encoders import FeatureExtractor
from rada.evaluate import evaluate_checkpoint
from rada.inference import predict
from rada.losses import CrossEntropy
from rada.tuning import FullTuning, Tuning
from rada_kernels import Options

pytest.importorskip("open_clip")
FULL = FullTuning(epochs=1, batch_size=4, lr=1e-3)


class Colours:
    """Images in memory."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        from PIL import Image

        return Image.new("RGB", (16, 16), (40 * (index % 3), 5 * index, 90))


class Own(torch.nn.Module):
    """An encoder of a user's own."""

    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 16))
        self.visual.image_size = 8
        self.text = torch.nn.EmbeddingBag(256, 16)
        self.logit_scale = torch.nn.Parameter(torch.tensor(20.0).log())

    def encode_image(self, image):
        return self.visual(image)

    def encode_text(self, tokens):
        return self.text(tokens)


def test_objects_of_ones_own_are_trained_on(tmp_path, recwarn):
    from torchvision import transforms

    splits = [Split(torch.arange(count) % 3, images=Colours(count)) for count in (12, 6)]
    source = Source("own", ("red", "green", "blue"), *splits)
    preprocess = transforms.Compose([transforms.Resize(8), transforms.CenterCrop(8), transforms.ToTensor()])

    def tokenizer(texts):
        return torch.tensor([list(text.encode().ljust(24)) for text in texts])

    encoders = FeatureExtractor(Own().requires_grad_(False), tokenizer=tokenizer, preprocess=preprocess)
    calls, rows = [], []

    def loss(logits, labels, penalty, regularizer=0.0):
        calls.append(len(labels))
        return CrossEntropy(0.5)(logits, labels, penalty, regularizer)

    found = rada.train(
        source,
        encoders,
        output=tmp_path / "run",
        loss=loss,
        callbacks=[rows.append],
        methods=("rada", "full"),
        shots=2,
        seeds=(1,),
        full=FULL,
        tuning=Tuning(epochs=1),
        head=Options(num_heads=4),
    )
    # Images without names are numbered in each split; equal numbers are no overlap.
    assert not [w for w in recwarn if "in the test split too" in str(w.message)]
    assert found["status"] == "complete"
    assert calls == [6]
    assert [(row["method"], row["epoch"]) for row in rows] == [("rada", 0), ("rada", 1), ("full", 1)]
    checkpoint = rada.load(tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="checkpoint: its encoders were objects"):
        checkpoint.open_model()


def test_what_ones_own_loop_saved_is_evaluated_and_predicts(images, model_dir, tmp_path):
    source = load_source(f"folder:{images}")
    for train_towers in (False, True):
        torch.manual_seed(0)
        clip = rada.RAdaCLIP.from_open_clip(
            f"local-dir:{model_dir}", prompt_names(source.class_names), num_heads=4, freeze=not train_towers
        )
        with torch.no_grad():
            clip.head.out_proj.weight.normal_(std=0.05)
            if train_towers:
                clip.model.visual.proj.mul_(-1)
        folder = rada.save(tmp_path / f"own-{train_towers}", clip.eval())
        with pytest.warns(UserWarning, match=r"it has no split\.json"):
            found = evaluate_checkpoint(folder, f"folder:{images}", device="cpu")
        pixels = torch.stack([clip.preprocess(image) for image in source.test.images])
        with torch.no_grad():
            right = clip(pixels).argmax(-1) == source.test.labels
        assert found["rada"]["all"] == pytest.approx(100 * right.double().mean().item())
        done = predict(folder, tmp_path / f"{train_towers}.jsonl", images=images, device="cpu")
        assert done["items"] == 24


def test_a_head_alone_takes_its_classes(tmp_path):
    head = rada.RAdaHead(16, 4)
    with pytest.raises(ValueError, match="classes, class_names, backbone: got none with a head alone"):
        rada.save(tmp_path, head)


def test_an_encoder_without_a_text_tower_is_named():
    class Images(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = Own().visual
            self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

        def encode_image(self, image):
            return self.visual(image)

    extractor = FeatureExtractor(Images(), tokenizer=lambda texts: torch.zeros(len(texts), 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"model: got Images, which has no text tower \(encode_text\)"):
        extractor.classes(["red"])
