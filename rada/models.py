"""Opening encoders: an open_clip model, by its name or as an object; a transformers model; or the demo's."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rada.checks import check_one_of
from rada.data.images import to_rgb
from rada.encoders import FeatureExtractor, vocabulary_size
from rada.extras import require
from rada.precision import PRECISIONS, autocast_dtype, lower_weights
from rada.templates import DEFAULT_TEMPLATES, check_templates

CLIP_VOCABULARY = 49408
OPEN_CLIP_PRECISIONS = ("fp32", "fp16", "bf16", "pure_fp16", "pure_bf16")
DEMO_MODEL = "demo"
TRANSFORMERS = "transformers:"
# An open_clip model: its towers have no annotations.
OpenCLIP = Any
# The name of the package in error messages.
USER = "an open_clip model"


@dataclass(frozen=True)
class ModelSpec:
    """The name of encoders, as checkpoints store it.

    name: "demo" (the small model of `rada.demo`), a name that open_clip takes, or "transformers:NAME" (CLIP, SigLIP or
        SigLIP 2 of transformers, by its name there or its folder).
    pretrained: a tag of open_clip's or the path of a checkpoint, as for `open_model`.
    templates: prompt templates.
    """

    name: str
    pretrained: str | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def open(self, device: torch.device, precision: str = "fp32") -> FeatureExtractor:
        """The encoders, frozen. precision: see `rada.precision`."""
        check_one_of(PRECISIONS, precision=precision)
        encoders = self._open(device, precision)
        encoders.spec = self
        encoders.amp = autocast_dtype(precision, device) if precision == "amp" else None
        return encoders

    def _open(self, device: torch.device, precision: str) -> FeatureExtractor:
        own = self.name == DEMO_MODEL or self.name.startswith(TRANSFORMERS)
        if not own:
            weights = "fp32" if precision == "amp" else precision
            return open_model(
                self.name, pretrained=self.pretrained, templates=self.templates, device=device, precision=weights
            )
        if self.pretrained is not None:
            raise ValueError(f"pretrained: got {self.pretrained!r}; the model {self.name!r} brings its own weights")
        model: Any
        if self.name == DEMO_MODEL:
            from rada.demo import load_demo_model

            model, preprocess, tokenizer = load_demo_model(device)
            backbone = "rada-demo"
        else:
            from rada.huggingface import HuggingFaceEncoder

            backbone = self.name.removeprefix(TRANSFORMERS)
            try:
                model = HuggingFaceEncoder.from_pretrained(backbone)
            except (OSError, ValueError) as error:  # transformers' own, which do not name the argument
                raise ValueError(f"model: {self.name} cannot be opened: {error}") from error
            preprocess, tokenizer = model.preprocess, model.tokenizer
        return open_model(
            lower_weights(model, precision),
            templates=self.templates,
            preprocess=preprocess,
            tokenizer=tokenizer,
            device=device,
            backbone=backbone,
        )


def open_model(
    model_or_name: nn.Module | str,
    *,
    templates: str | Sequence[str] = DEFAULT_TEMPLATES,
    pretrained: str | os.PathLike | None = None,
    preprocess: Callable | None = None,
    tokenizer: Callable | None = None,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    freeze: bool = True,
    backbone: str | None = None,
) -> FeatureExtractor:
    """An open_clip model (CLIP, CustomTextCLIP as SigLIP is, CoCa) with its transform, tokenizer and templates.

    model_or_name: a model, or a name: one of `open_clip.list_models()`, "hf-hub:..." or "local-dir:...".
    templates: format strings with "{}" or "{class}". Default: "a photo of a {}.".
    pretrained: only with a name: a tag of open_clip's, which is downloaded, or the path of a checkpoint.
    preprocess: default: the model's own evaluation transform, after `rada.data.images.to_rgb`: transparency is laid
        on white.
    tokenizer: default: the name's; for a model given as an object, CLIP's own if its vocabulary is CLIP's.
    device: default: where the model is; "cpu" with a name.
    precision: only with a name: "fp32" (default), "fp16", "bf16", "pure_fp16" or "pure_bf16", as open_clip has it.
    freeze: freeze the model. Default True. To train one tower, set `requires_grad_` on it afterwards and call
        `train()`. Of CoCa the caption decoder, which takes no part here, is always frozen.
    backbone: the name that checkpoints carry. Default: from the name and `pretrained`, or the model's class.

    Raises ImportError without open_clip; ValueError for an unknown name or tag (with the nearest that exist), a
    checkpoint that does not fit, bad templates.
    """
    templates = check_templates(templates)
    own_preprocess: Callable | None
    spec = None
    if isinstance(model_or_name, str):
        if preprocess is None and tokenizer is None:
            spec = ModelSpec(model_or_name, None if pretrained is None else os.fspath(pretrained), templates)
        model, own_preprocess, own_backbone = _create(model_or_name, pretrained, precision, device)
        if tokenizer is None:
            tokenizer = require("open_clip", "clip", USER).get_tokenizer(model_or_name)
    else:
        _refuse(pretrained=pretrained, precision=None if precision == "fp32" else precision)
        model, own_backbone = model_or_name, type(model_or_name).__name__
        own_preprocess = _transform_of(model) if preprocess is None else None
        tokenizer = tokenizer or _tokenizer_of(model)
    if device is not None:
        model = model.to(device)
    if freeze:
        model.requires_grad_(False)
    if isinstance(decoder := getattr(model, "text_decoder", None), nn.Module):
        decoder.requires_grad_(False)
    encoders = FeatureExtractor(
        model,
        tokenizer=tokenizer,
        templates=templates,
        preprocess=preprocess or own_preprocess,
        backbone=own_backbone if backbone is None else backbone,
    )
    encoders.spec = spec
    return encoders


def _refuse(**of_names: Any) -> None:
    for name, value in of_names.items():
        if value is not None:
            raise ValueError(f"{name}: got {value!r} with a model given as an object; it goes with a model's name only")


def _create(name: str, pretrained, precision: str, device) -> tuple[nn.Module, Callable, str]:
    """(model, preprocess, backbone) by open_clip's name."""
    open_clip = require("open_clip", "clip", USER)
    check_one_of(OPEN_CLIP_PRECISIONS, precision=precision)
    pretrained = None if pretrained is None else os.fspath(pretrained)
    backbone = name
    if name.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise ValueError(
                f"pretrained: got {pretrained!r}; with {name!r} the weights come from there, so it takes None"
            )
    else:
        known = open_clip.list_models()
        if name.replace("/", "-") not in known:
            raise ValueError(f"model_or_name: got {name!r}; {_nearest(name, known)}")
        tags = open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))
        if pretrained is None:
            warnings.warn(
                f"pretrained: got None, so {name} has random weights; it takes a checkpoint's path or one of {tags}",
                stacklevel=4,
            )
        elif open_clip.is_pretrained_cfg(name.replace("/", "-"), pretrained):
            backbone = f"{name}/{pretrained}"
        elif os.path.isfile(pretrained):
            backbone = f"{name}/{os.path.basename(pretrained)}"
        else:
            raise ValueError(
                f"pretrained: got {pretrained!r}, which is no file and no tag of {name}; it takes a path or "
                f"one of {tags}"
            )
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, precision=precision, device="cpu" if device is None else device
        )
    except Exception as error:  # a file that is no checkpoint of this model may raise anything
        if pretrained is None or not os.path.isfile(pretrained):
            raise
        raise ValueError(f"pretrained: {pretrained} does not fit the model {name}: {error}") from error
    return model, _of_any_mode(preprocess), backbone


def _nearest(name: str, known: Sequence[str]) -> str:
    folded = {model.lower(): model for model in known}
    near = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=5, cutoff=0.4)]
    return f"the nearest are {near}" if near else "it takes one of open_clip.list_models()"


def _transform_of(model: OpenCLIP) -> Callable | None:
    config = getattr(model.visual, "preprocess_cfg", None)
    if config is None:
        return None
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return _of_any_mode(image_transform_v2(PreprocessCfg(**config), is_train=False))


def _of_any_mode(transform: Callable) -> Callable:
    """The transform after a conversion to RGB. (open_clip's own lays transparency on black.)"""
    return require("torchvision.transforms", "clip", USER).Compose([_rgb, transform])


def _rgb(image):
    from PIL.Image import Image

    return to_rgb(image) if isinstance(image, Image) else image  # transforms take tensors too


def _tokenizer_of(model: OpenCLIP) -> Callable:
    if vocabulary_size(model) != CLIP_VOCABULARY:
        raise ValueError(
            "tokenizer: got None with a model whose vocabulary is not CLIP's; it takes the model's own, "
            "as open_clip.get_tokenizer makes it"
        )
    return require("open_clip", "clip", USER).SimpleTokenizer(context_length=model.context_length)
