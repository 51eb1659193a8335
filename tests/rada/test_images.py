"""Images of every mode to RGB: what is transparent is white, what is deep is scaled."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from rada.data import load_source  # noqa: E402
from rada.data.images import ImageFiles, to_rgb  # noqa: E402

RED, WHITE = [255, 0, 0], [255, 255, 255]
# Red, at three alphas: none, full, half. White shines through; 127 is what is left of it under half of black.
RGBA = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
DEEP = [0, 100 * 257, 65535, 300]  # 300 is 1.2 of 255: clipping would make it white
DEEP_RGB = [0, 100, 255, 1]


def reread(image, file_format: str, **options):
    """The image as a file of that format gives it back."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def palette_image():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    return image


def pixels(image) -> list:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    return np.asarray(rgb).reshape(-1, 3).tolist()


@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_an_alpha_channel_is_laid_on_white(file_format, options):
    image = reread(Image.fromarray(RGBA), file_format, **options)
    assert image.mode == "RGBA"
    assert pixels(image) == [WHITE, RED, [127, 127, 127]]
    assert pixels(Image.fromarray(RGBA[..., [0, 3]], "LA")) == [WHITE, [255, 255, 255], [127, 127, 127]]
    assert pixels(reread(Image.fromarray(RGBA[:, 2:, [0, 3]], "LA"), "PNG")) == [[127, 127, 127]]


def test_a_palette_with_transparency_is_laid_on_white():
    image = palette_image()
    assert pixels(reread(image, "PNG")) == [[10, 20, 30], [200, 100, 50]]
    for file_format in ("PNG", "GIF"):
        by_index = reread(image, file_format, transparency=0)
        assert by_index.mode == "P"
        assert pixels(by_index) == [WHITE, [200, 100, 50]]
    by_bytes = reread(image, "PNG", transparency=bytes([0, 128]))
    assert isinstance(by_bytes.info["transparency"], bytes)
    assert pixels(by_bytes) == [WHITE, [227, 177, 152]]
    assert pixels(Image.fromarray(RGBA).convert("PA")) == [WHITE, RED, [127, 127, 127]]
    quantized = Image.fromarray(RGBA).quantize()  # a palette of RGBA colours
    assert quantized.mode == "P"
    assert pixels(quantized) == [WHITE, RED, [127, 127, 127]]


def test_a_transparent_colour_is_white():
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(reread(rgb, "PNG", transparency=(1, 2, 3))) == [WHITE, [4, 5, 6]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert pixels(reread(grey, "PNG", transparency=7)) == [WHITE, [9, 9, 9]]
    deep = Image.fromarray(np.array([DEEP], np.uint16))
    assert pixels(reread(deep, "PNG", transparency=300)) == [[v] * 3 for v in (0, 100, 255, 255)]


def test_deep_greys_are_scaled():
    grey = [[value] * 3 for value in DEEP_RGB]
    assert pixels(reread(Image.fromarray(np.array([DEEP], np.uint16)), "PNG")) == grey
    assert pixels(reread(Image.fromarray(np.array([DEEP], np.uint16)), "TIFF")) == grey
    assert pixels(reread(Image.fromarray(np.array([DEEP], np.int32)), "TIFF")) == grey
    assert pixels(Image.frombytes("I;16B", (4, 1), np.array(DEEP, ">u2").tobytes())) == grey
    twelve_bit = b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes()
    assert pixels(Image.open(io.BytesIO(twelve_bit))) == [[v] * 3 for v in (0, 128, 255)]
    assert pixels(Image.fromarray(np.array([[0, 0.5, 1]], np.float32))) == [[v] * 3 for v in (0, 128, 255)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 3_000_000]], np.int32), "mode I with values from 0 to 3000000; it takes 0 to 65535"),
        (np.array([[0, -1]], np.int32), "mode I with values from -1 to 0"),
        (np.array([[0, 200]], np.float32), r"mode F with values from 0\.0 to 200\.0; it takes 0 to 1"),
        (np.array([[0, np.nan]], np.float32), "mode F with values from nan"),
    ],
)
def test_a_deep_grey_of_another_range_is_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=rf"deep\.tif: not a readable image .*{message}"):
        ImageFiles([tmp_path / "deep.tif"])[0]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_as_pillow_has_them(mode):
    image = Image.new(mode, (2, 2))
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_a_folder_and_a_prediction_see_white(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(RGBA).save(tmp_path / name / f"{i}.png")
    source = load_source(f"folder:{tmp_path}")
    for images in (source.train.images, source.test.images):
        assert np.asarray(images[0]).reshape(-1, 3).tolist() == [WHITE, RED, [127, 127, 127]]


def test_the_transform_of_a_model_sees_white(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    import torch

    from rada import RAdaCLIP

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}", load_weights=False)
    preprocess = RAdaCLIP.from_open_clip(model, ["a"], num_heads=4).preprocess
    transparent = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert torch.equal(preprocess(transparent), preprocess(Image.new("RGB", (20, 20), "white")))
