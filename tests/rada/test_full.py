"""Full fine-tuning: settings, augmentation, exact resume, weight interpolation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from rada import RAdaCLIP
from rada.tuning.full import (
    STATE,
    Augmented,
    FineTuner,
    FullTuning,
    parameter_groups,
    train_transform,
)
from rada.tuning.interpolation import interpolate, snapshot, wise_ft

open_clip = pytest.importorskip("open_clip")
NAMES = ("red square", "blue square", "green square")
COLOURS = ((220, 30, 30), (30, 30, 220), (30, 200, 30))


def model(seed: int = 0) -> RAdaCLIP:
    """A random CLIP of two layers, of width 32, whose towers train."""
    torch.manual_seed(seed)
    towers = open_clip.CLIP(
        embed_dim=32,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16),
        text_cfg=open_clip.CLIPTextCfg(layers=2, width=32, heads=2, context_length=12),
    )
    towers.visual.preprocess_cfg = {"size": 16}
    return RAdaCLIP.from_open_clip(towers, NAMES, num_heads=4, freeze=False)


def data(per_class: int = 4) -> tuple[list, torch.Tensor]:
    images = [Image.new("RGB", (20, 18), COLOURS[k]) for k in range(3) for _ in range(per_class)]
    return images, torch.arange(3).repeat_interleave(per_class)


class DrawnImages(list):
    """A user's own images, which draw when they are indexed."""

    def __getitem__(self, i):
        shift = random.randrange(60) + int(np.random.randint(60))
        return super().__getitem__(i).point(lambda value: min(255, value + shift))


def tuner(clip: RAdaCLIP, tuning: FullTuning | None = None, images: type = list, **options) -> FineTuner:
    tuning, (own, labels) = tuning or FullTuning(epochs=2, batch_size=4, lr=1e-3, head_lr=1e-2), data()
    return FineTuner(clip, images(own), labels, tuning, seed=1, **options)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 4])  # in the first epoch, at its end, in the second
@pytest.mark.parametrize(("precision", "images"), [("fp32", list), ("bf16", list), ("fp32", DrawnImages)])
def test_a_killed_and_resumed_run_gives_the_same_weights(at, precision, images, tmp_path):
    tuning = FullTuning(epochs=2, batch_size=4, lr=1e-3, head_lr=1e-2, precision=precision, clip_norm=1.0)
    whole = model()
    seed_all(5)
    rows = tuner(whole, tuning, images).run()

    killed = model()
    seed_all(5)
    first = tuner(killed, tuning, images, folder=tmp_path, save_every=1)
    take, steps = first._take_step, iter(range(at + 1))

    def dies(images, labels):
        if next(steps) == at:
            raise Killed
        take(images, labels)

    first._take_step = dies
    with pytest.raises(Killed):
        first.run()
    seed_all(99)  # another process: its random state is another
    again = model(seed=3)  # and so are its weights
    resumed = tuner(again, tuning, images, folder=tmp_path, save_every=1)
    assert resumed.resume()
    assert resumed.step == at
    assert resumed.run() == rows
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_resume_refuses_another_run(tmp_path):
    first = tuner(model(), folder=tmp_path)
    assert not first.resume()
    first.save()
    with pytest.raises(ValueError, match=r"lr: got 0\.01; the run to resume in .* takes 0\.001"):
        tuner(model(), FullTuning(epochs=2, batch_size=4, lr=1e-2, head_lr=1e-2), folder=tmp_path).resume()
    (tmp_path / STATE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a state to resume from"):
        tuner(model(), folder=tmp_path).resume()


def test_towers_and_head_learn():
    clip = model()
    start = snapshot(clip)
    rows = tuner(clip, FullTuning(epochs=6, batch_size=6, lr=2e-3, head_lr=2e-3, crop=(0.8, 1.0))).run()
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    moved = {name.split(".")[0] + "." + name.split(".")[1] for name, p in clip.named_parameters()
             if name in start and not torch.equal(p, start[name])}  # fmt: skip
    assert {"model.visual", "model.transformer", "model.logit_scale", "head.out_proj", "head.k_proj"} <= moved


def test_accumulated_parts_make_the_gradient_of_the_whole_batch():
    gradients = []
    for accumulate in (1, 3):
        clip = model()
        torch.nn.init.normal_(clip.head.out_proj.weight, std=0.1)
        run = tuner(clip, FullTuning(epochs=1, batch_size=12, accumulate=accumulate))
        images, index = next(iter(run._batches()))
        run._backward(images, run.labels[index])
        gradients.append({name: p.grad for name, p in clip.named_parameters() if p.grad is not None})
    whole, parts = gradients
    assert whole.keys() == parts.keys()
    assert "model.visual.conv1.weight" in whole
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_contrastive_loss_is_clips_over_the_batch():
    """With an untrained head: symmetric cross-entropy of s f hᵀ, images of one class as negatives."""
    clip = model()
    run = tuner(clip, FullTuning(loss="contrastive", batch_size=6))
    images, index = next(iter(run._batches()))
    labels = run.labels[index]
    loss, penalty, hits = run._loss(images, labels)
    f, h = clip.encode_images(images), clip.text_features[labels]
    logits = (clip.logit_scale * f @ h.T).double()
    pairs = torch.arange(6)
    expected = (
        torch.nn.functional.cross_entropy(logits, pairs) + torch.nn.functional.cross_entropy(logits.T, pairs)
    ) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert penalty.item() == 0
    assert 0 <= int(hits) <= 6


def test_only_weights_decay():
    clip = model()
    groups = parameter_groups(clip, FullTuning(lr=1e-5, head_lr=1e-3, weight_decay=0.2))
    of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in clip.named_parameters():
        group = of[id(parameter)]
        assert group["lr"] == (1e-3 if name.startswith("head.") else 1e-5), name
        assert group["weight_decay"] == (0.2 if parameter.dim() >= 2 else 0), name
    assert of[id(clip.model.logit_scale)]["weight_decay"] == 0


def test_rates_warm_up_and_follow_a_cosine():
    tuning = FullTuning(warmup=0.2)
    assert [tuning.rate(step, 10) for step in (0, 1, 2)] == [0.5, 1, 1]
    assert tuning.rate(6, 10) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert FullTuning(warmup=0).rate(0, 10) == 1


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    images, _ = data()
    textured = [Image.effect_noise((24, 24), 60).convert("RGB") for _ in images]
    transform = train_transform(model(), (0.3, 1.0), True)
    views = Augmented(textured, transform, seed=1)
    first = views[0, 3][0]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(views[0, 3][0], first)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are left alone
    assert not torch.equal(views[1, 3][0], first)
    assert not torch.equal(Augmented(textured, transform, seed=2)[0, 3][0], first)
    assert first.shape == (3, 16, 16)


def test_a_loss_that_is_not_finite_stops_with_the_step():
    clip = model()
    run = tuner(clip)
    before = snapshot(clip)
    with torch.no_grad():
        clip.head.out_proj.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"not finite at step 1 of 6"):
        run.run()
    for name, parameter in clip.named_parameters():
        if name in before and name != "head.out_proj.bias":
            assert torch.equal(parameter, before[name]), name


def test_wise_ft_walks_from_the_start_to_the_trained_weights():
    clip = model()
    start = snapshot(clip)
    tuner(clip).run()
    trained = snapshot(clip)
    seen = []

    def evaluate():
        weight = clip.head.out_proj.weight
        seen.append(weight.detach().clone())
        return {"norm": float(weight.norm())}

    rows = wise_ft(clip, start, evaluate, alphas=(0.0, 0.5, 1.0))
    assert [row["alpha"] for row in rows] == [0, 0.5, 1]
    name = "head.out_proj.weight"
    assert torch.equal(seen[0], start[name])
    assert torch.equal(seen[2], trained[name])
    torch.testing.assert_close(seen[1], (start[name] + trained[name]) / 2)
    for key, value in snapshot(clip).items():
        assert torch.equal(value, trained[key]), key
    interpolate(clip, start, trained, 0.0)
    assert torch.equal(clip.head.out_proj.weight, start[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 5}, "accumulate: got 5; it takes a divisor of batch_size 32"),
        ({"loss": "hinge"}, "loss: got 'hinge'; it takes one of"),
        ({"precision": "fp8"}, "precision: got 'fp8'"),
        ({"crop": (0.0, 1.0)}, "crop: got"),
        ({"warmup": 1.0}, "warmup: got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"epochs": 0}, "epochs: got 0"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        FullTuning(**options)


def test_labels_are_checked():
    with pytest.raises(ValueError, match="labels: got 2 for 12 images"):
        FineTuner(model(), data()[0], torch.tensor([0, 1]), FullTuning())


def test_a_head_that_shares_its_classes_is_refused():
    """It takes a whole batch in every process, where fine-tuning splits it."""
    clip = model()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        clip.head = clip.head.shard_classes()
        with pytest.raises(ValueError, match=r"model: got a head that shares its classes .* without"):
            tuner(clip)
    finally:
        dist.destroy_process_group()
