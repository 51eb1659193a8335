"""Checkpoint files as the released training code writes them, through Dassl, and files that mean harm."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import warnings

import pytest
import torch
from torch import nn

from rada import RAdaHead
from rada_kernels import Options

WIDTH = 16


class ConstantWarmupScheduler(torch.optim.lr_scheduler.LRScheduler):
    """As Dassl's: its state holds its successor, a scheduler of torch's, as an object."""

    def __init__(self, optimizer, successor, warmup_epoch, cons_lr):
        self.successor, self.warmup_epoch, self.cons_lr = successor, warmup_epoch, cons_lr
        super().__init__(optimizer)

    def get_lr(self):
        if self.last_epoch >= self.warmup_epoch:
            return self.successor.get_last_lr()
        return [self.cons_lr for _ in self.base_lrs]

    def step(self, epoch=None):
        if self.last_epoch >= self.warmup_epoch:
            self.successor.step(epoch)
            self._last_lr = self.successor.get_last_lr()
        else:
            super().step(epoch)


def trained_model(optimizer_class):
    """A model with a head called mha beside other layers, after three epochs of one step; optimizer and scheduler."""
    model = nn.ModuleDict({"image_encoder": nn.Linear(4, 4), "mha": RAdaHead(WIDTH, 8)})
    model["mha"].requires_grad_(True)
    optimizer = optimizer_class(model["mha"].parameters(), lr=1e-3)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5.0)
    scheduler = ConstantWarmupScheduler(optimizer, successor, 1, 1e-5)
    for _ in range(3):
        optimizer.zero_grad()
        image, text = torch.randn(4, WIDTH), torch.randn(5, WIDTH)
        nn.functional.cross_entropy(model["mha"](image, text, 10.0), torch.randint(5, (4,))).backward()
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
    return model, optimizer, scheduler


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_a_checkpoint_of_dassl_loads(tmp_path, optimizer_class):
    model, optimizer, scheduler = trained_model(optimizer_class)
    state = {
        "state_dict": model.state_dict(),
        "epoch": 5,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "val_result": None,
    }
    assert isinstance(state["scheduler"]["successor"], torch.optim.lr_scheduler.CosineAnnealingLR)
    path = tmp_path / "model.pth.tar-5"
    torch.save(state, path)
    with pytest.raises(pickle.UnpicklingError):  # so the test can fail
        torch.load(path, weights_only=True)
    head = RAdaHead.from_released(path, 8, temperature=0.5)
    assert head.options == Options(8, 0.5)
    for name, tensor in model["mha"].state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor)


def test_what_a_checkpoint_does_not_hold_is_assumed_aloud():
    state = RAdaHead(WIDTH, 8).state_dict()
    with pytest.warns(UserWarning, match=r"assumed num_heads=8, temperature=1\.0, which a checkpoint does not hold"):
        head = RAdaHead.from_released(state)
    assert head.options == Options(8, 1.0)
    with pytest.warns(UserWarning, match=r"assumed temperature=1\.0, which"):
        RAdaHead.from_released(state, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RAdaHead.from_released(state, num_heads=4, temperature=1.0)


class Harm:
    """A pickle that calls a function when it is read."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class Attribute(Harm):
    """The same, where the call comes with the object's state."""

    def __reduce__(self):
        return (nn.Module, (), {"x": Harm(*self.call[0:1], *self.call[1])})


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ["touch {}"]),
        (subprocess.check_call, [["touch", "{}"]]),
        (eval, ["open('{}', 'w')"]),
        (exec, ["open('{}', 'w')"]),
        (io.FileIO, ["{}", "w"]),
    ],
)
@pytest.mark.parametrize("kind", [Harm, Attribute])
def test_nothing_in_a_file_is_run(tmp_path, function, arguments, kind):
    touched = tmp_path / "touched"

    def fill(value):
        return [fill(part) for part in value] if isinstance(value, list) else value.format(touched)

    state = {"state_dict": RAdaHead(WIDTH, 8).state_dict(), "scheduler": kind(function, *fill(arguments))}
    path = tmp_path / "model.pth.tar-5"
    torch.save(state, path)
    torch.load(path, weights_only=False)
    assert touched.exists()  # it does harm where it is run
    touched.unlink()
    try:
        head = RAdaHead.from_released(path, 8, temperature=1.0)
        assert torch.equal(head.k_proj.weight, state["state_dict"]["k_proj.weight"])
    except ValueError as error:
        assert "nothing in it was run" in str(error)  # noqa: PT017  (either will do)
    assert not touched.exists()


def test_harm_in_the_place_of_the_state_dict_is_an_error(tmp_path):
    touched = tmp_path / "touched"
    path = tmp_path / "model.pth.tar-5"
    torch.save({"state_dict": Harm(io.FileIO, str(touched), "w")}, path)
    with pytest.raises(ValueError, match="it takes a state dict"):
        RAdaHead.from_released(path, 8, temperature=1.0)
    torch.save({"state_dict": Harm(os.system, f"touch {touched}")}, path)
    with pytest.raises(ValueError, match=r"not read, and nothing in it was run \(.*module (posix|nt) is blocked\.\)"):
        RAdaHead.from_released(path, 8, temperature=1.0)
    assert not touched.exists()


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        RAdaHead.from_released(tmp_path / "nowhere")
    path = tmp_path / "model.pth.tar-5"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"model\.pth\.tar-5: not read, .* it takes a file that torch\.save wrote"):
        RAdaHead.from_released(path)
    torch.save({"state_dict": RAdaHead(WIDTH, 8).state_dict()}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.pth\.tar-5: not read"):
        RAdaHead.from_released(path)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match=r"model\.pth\.tar-5: not read"):
        RAdaHead.from_released(path)
