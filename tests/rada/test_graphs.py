"""A head in a CUDA graph. What needs a GPU is skipped without one: python -m pytest -m gpu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rada.fused import RAdaHead
from rada.graphs import _check, graphed, of_any_number

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


def test_elsewhere_the_head_is_returned():
    def head(features: Tensor) -> Tensor:
        return features

    assert graphed(head, torch.randn(3, 8)) is head


@pytest.mark.parametrize(
    ("features", "got"),
    [(torch.randn(3, 7), r"got \[n, 7\], torch.float32"), (torch.randn(3, 8).half(), r"got \[n, 8\], torch.float16")],
)
def test_features_that_were_not_captured_are_named(features, got):
    with pytest.raises(ValueError, match=rf"^features: {got}.*it takes \[n, 8\], torch.float32, cpu, as captured"):
        _check(features, torch.randn(5, 8))


def test_batches_of_any_size_share_one_capture():
    """With a head's own work in place of a graph's: fewer rows than captured, as many, more, none, and fewer again."""
    rada = RAdaHead(16, 2, dtype=torch.float64)
    torch.nn.init.normal_(rada.out_proj.weight, std=0.3)
    text, static, calls = torch.randn(5, 16).double(), torch.randn(4, 16).double(), []

    def head(features: Tensor) -> Tensor:
        calls.append(len(features))
        return rada(features, text, 100.0)

    out = head(static).detach()
    replay = of_any_number(head, static, out, lambda: out.copy_(head(static).detach()))
    kept = []
    for count in (4, 1, 6, 3, 0, 4):
        features = torch.randn(count, 16).double()
        logits = replay(features)
        kept.append((logits, rada(features, text, 100.0).detach()))
        assert not logits.requires_grad
    for logits, truth in kept:
        torch.testing.assert_close(logits, truth)
    assert calls == [4, 4, 4, 6, 4, 4, 4], "six images were more than captured"


@pytest.fixture
def on_gpu():
    """A head, its function of features, and a batch of eight."""
    rada = RAdaHead(64, 2, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(rada.out_proj.weight, std=0.3)
    text = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)
    batch = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    return rada, lambda features: rada(features, text, 100.0), batch


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("count", [8, 5, 1, 12, 0])
def test_a_replay_gives_the_heads_own_logits(count, on_gpu):
    """Of a whole batch, of a last one, and of more than was captured; earlier results stay as they were."""
    _, head, batch = on_gpu
    replay = graphed(head, batch)
    before = replay(batch)
    kept = before.clone()
    features = torch.randn(count, 64, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(replay(features), head(features).detach(), rtol=1e-2, atol=1e-2)
    assert torch.equal(before, kept)
    assert torch.equal(replay(batch), kept)
    assert not replay(features).requires_grad


@pytest.mark.gpu
@NEEDS_GPU
def test_weights_that_change_in_place_are_read_anew(on_gpu):
    rada, head, batch = on_gpu
    replay = graphed(head, batch)
    before = replay(batch)
    with torch.no_grad():
        rada.out_proj.weight.mul_(-1)
    assert not torch.equal(replay(batch), before)
    assert torch.equal(replay(batch), head(batch).detach())
