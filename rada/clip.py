"""RAdaCLIP: any open_clip model with a RAda head on top."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rada.data.images import to_rgb
from rada.extras import require
from rada.fused import RAdaHead
from rada.templates import DEFAULT_TEMPLATES, check_templates, fill

# Prompts per call of the text tower: large enough to keep a device busy, small enough for any memory.
PROMPTS_PER_BATCH = 256
CLIP_VOCABULARY = 49408
# An open_clip model: its towers have no annotations.
OpenCLIP = Any
PRECISIONS = ("fp32", "fp16", "bf16", "pure_fp16", "pure_bf16")


class RAdaCLIP(nn.Module):
    """An open_clip model and a RAda head over its classes. Made by `RAdaCLIP.from_open_clip`.

    model: the open_clip model.
    head: the RAdaHead; its parameters, float32 by default, set the dtype that features are cast to.
    preprocess: the evaluation transform, PIL image -> [3, H, W], or None where the model came without one.
    tokenizer: strings -> token ids.
    class_names: K names. templates: T format strings. `set_classes` changes the names.
    backbone: what `rada.checkpoint` stores beside the head.

    A tower none of whose parameters requires a gradient is frozen: it runs without gradients and stays in
    eval mode whatever `train()` says. While all of the model is frozen, the state dict is the head's alone
    ("head.*"), and loading such a one is strict about the head and leaves the model as it is. A full state
    dict loads too.

    Drop-in for DistributedDataParallel: parameters that forward does not use do not require a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        head: RAdaHead,
        class_names: Sequence[str],
        *,
        tokenizer: Callable,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        preprocess: Callable | None = None,
        backbone: str | None = None,
    ):
        super().__init__()
        self.model: OpenCLIP = model
        self.head = head
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.templates = check_templates(templates)
        self.backbone = type(model).__name__ if backbone is None else backbone
        self.register_buffer("_text_features", None, persistent=False)
        self.register_state_dict_post_hook(_drop_frozen_model)
        self.register_load_state_dict_pre_hook(_keep_frozen_model)
        self.train()
        self.set_classes(class_names)

    @classmethod
    def from_open_clip(
        cls,
        model_or_name: nn.Module | str,
        class_names: Sequence[str],
        *,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        pretrained: str | os.PathLike | None = None,
        preprocess: Callable | None = None,
        tokenizer: Callable | None = None,
        device: torch.device | str | None = None,
        precision: str = "fp32",
        freeze: bool = True,
        num_heads: int = 8,
        backbone: str | None = None,
        **head_options: Any,
    ) -> RAdaCLIP:
        """An open_clip model (CLIP, CustomTextCLIP as SigLIP is, CoCa) under a new, untrained head.

        model_or_name: a model, or a name: one of `open_clip.list_models()`, "hf-hub:..." or "local-dir:...".
        class_names: K names, put into the templates as they are.
        templates: format strings with "{}" or "{class}". Default: "a photo of a {}.".
        pretrained: only with a name: a tag of open_clip's, which is downloaded, or the path of a checkpoint.
        preprocess: default: the model's own evaluation transform, after `rada.data.images.to_rgb`: transparency is laid
            on white.
        tokenizer: default: the name's; for a model given as an object, CLIP's own if its vocabulary is
            CLIP's.
        device: of model and head. Default: where the model is; "cpu" with a name.
        precision: only with a name: "fp32" (default), "fp16", "bf16", "pure_fp16" or "pure_bf16", as
            open_clip has it.
        freeze: freeze the model. Default True. To train one tower, set `requires_grad_` on it afterwards and
            call `train()`. Of CoCa the caption decoder, which takes no part here, is always frozen.
        num_heads, head_options: as for RAdaHead. embed_dim is read from the model.
        backbone: the name that checkpoints carry. Default: from the name and `pretrained`, or the model's
            class.

        Raises ImportError without open_clip; ValueError for an unknown name or tag (with the nearest that
        exist), a checkpoint that does not fit, towers of different widths, bad class names or templates.
        """
        templates = check_templates(templates)
        if isinstance(model_or_name, str):
            model, own_preprocess, own_tokenizer, own_backbone = _create(
                model_or_name, pretrained, precision, device, tokenizer is None
            )
        else:
            _refuse_with_object(pretrained=pretrained, precision=None if precision == "fp32" else precision)
            model, own_backbone = model_or_name, type(model_or_name).__name__
            own_preprocess = _transform_of(model) if preprocess is None else None
            own_tokenizer = _tokenizer_of(model) if tokenizer is None else None
        if device is not None:
            model = model.to(device)
        if freeze:
            model.requires_grad_(False)
        if hasattr(model, "text_decoder"):
            model.text_decoder.requires_grad_(False)
        head = RAdaHead(_image_width(model), num_heads, device=model.logit_scale.device, **head_options)
        return cls(
            model,
            head,
            class_names,
            tokenizer=own_tokenizer if tokenizer is None else tokenizer,
            templates=templates,
            preprocess=own_preprocess if preprocess is None else preprocess,
            backbone=own_backbone if backbone is None else backbone,
        )

    def set_classes(self, class_names: Sequence[str]) -> None:
        """Change the classes: encodes the new names' prompts; the head stays as it is."""
        if isinstance(class_names, str):
            raise TypeError(f"class_names: got the string {class_names!r}; it takes a sequence of names")
        class_names = tuple(class_names)
        bad = [name for name in class_names if not isinstance(name, str) or not name.strip()]
        if bad or not class_names:
            raise ValueError(f"class_names: got {bad[:8] or 'none'}; it takes at least one name, none empty")
        prompts = [fill(template, name) for name in class_names for template in self.templates]
        tokens = self.tokenizer(prompts)  # [K·T, L]
        size = _vocabulary_size(self.model)
        if size is not None and int(tokens.max()) >= size:
            raise ValueError(
                f"tokenizer: got token id {int(tokens.max())}; the model takes ids below {size}: pass its own tokenizer"
            )
        self._tokens = tokens.unflatten(0, (len(class_names), len(self.templates)))  # [K, T, L]
        self.class_names = class_names
        self._text_features = None if self._text_trains() else self._encode_classes()

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit-length image features [B, D], in the head's dtype, of preprocessed images [B, 3, H, W]."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images: got {type(images).__name__}; it takes a tensor [B, 3, H, W], as preprocess makes")
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(f"images: got {images.dtype} {list(images.shape)}; it takes floating [B, 3, H, W]")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._visual_trains()):
            features = self.model.encode_image(images.to(_input_dtype(self.model)))
            return F.normalize(features.to(self._dtype), dim=-1)

    @property
    def text_features(self) -> Tensor:
        """Unit-length class features [K, D] in the head's dtype: the mean of the templates' unit vectors, normalised.

        Kept while the text tower is frozen. While it trains, every access encodes all prompts, with gradients
        where they are enabled; in an evaluation loop take it once. After loading other weights into a frozen
        text tower by hand, call `set_classes(class_names)`.
        """
        if self._text_trains():
            self._text_features = None
            return self._encode_classes()
        if self._text_features is None:
            self._text_features = self._encode_classes()
        return self._text_features.to(self._dtype)

    @property
    def logit_scale(self) -> Tensor:
        """The exponentiated scale, 0-d float32."""
        return self.model.logit_scale.float().exp().reshape(())

    @property
    def logit_bias(self) -> Tensor | None:
        """SigLIP's bias, 0-d float32, or None."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.float().reshape(())

    def forward(self, images: Tensor, return_penalty: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, K] of preprocessed images [B, 3, H, W]; with return_penalty the head's penalty too."""
        return self.head(
            self.encode_images(images),
            self.text_features,
            self.logit_scale,
            self.logit_bias,
            return_penalty=return_penalty,
        )

    def zero_shot(self, images: Tensor) -> Tensor:
        """Logits [B, K] without the head: logit_scale · f hᵀ + logit_bias."""
        logits = self.logit_scale * (self.encode_images(images) @ self.text_features.T)
        return logits if self.logit_bias is None else logits + self.logit_bias

    def train(self, mode: bool = True) -> RAdaCLIP:
        """Set the training mode; frozen towers stay in eval mode."""
        super().train(mode)
        visual, text = mode and self._visual_trains(), mode and self._text_trains()
        self.model.training = visual or text
        for name, child in self.model.named_children():
            child.train(visual if name == "visual" else text)
        return self

    @property
    def _dtype(self) -> torch.dtype:
        return self.head.k_proj.weight.dtype

    def _visual_trains(self) -> bool:
        return any(p.requires_grad for p in self.model.visual.parameters())

    def _text_trains(self) -> bool:
        """Whether a parameter outside the image tower does, apart from the scale and the bias."""
        return any(
            p.requires_grad
            for name, p in self.model.named_parameters()
            if not name.startswith("visual.") and name not in ("logit_scale", "logit_bias")
        )

    def _encode_classes(self) -> Tensor:
        from tqdm import tqdm

        keep, device = not self._text_trains(), self.model.logit_scale.device
        batches = self._tokens.split(max(1, PROMPTS_PER_BATCH // len(self.templates)))
        # A bar where it is long: once per set of classes, not in every step of a tower that trains.
        quiet = not keep or len(batches) < 4
        rows = []
        # What is kept must serve any later call: no inference tensor, nothing rounded by an autocast.
        with (
            torch.inference_mode(torch.is_inference_mode_enabled() and not keep),
            torch.set_grad_enabled(torch.is_grad_enabled() and not keep),
            torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type) and not keep),
        ):
            for tokens in tqdm(batches, "encode classes", unit="batch", leave=False, disable=quiet):
                embeddings = self.model.encode_text(tokens.flatten(0, 1).to(device))  # [n·T, D]
                embeddings = F.normalize(embeddings.to(self._dtype), dim=-1).unflatten(0, tokens.shape[:2])
                rows.append(F.normalize(embeddings.mean(1), dim=-1))
            features = torch.cat(rows)
        if features.shape[1] != self.head.embed_dim:
            raise ValueError(
                f"model: got text features of width {features.shape[1]} but image features of width "
                f"{self.head.embed_dim}; both towers must agree"
            )
        return features


def _drop_frozen_model(module: RAdaCLIP, state: dict, prefix: str, _) -> None:
    if not any(p.requires_grad for p in module.model.parameters()):
        for key in [key for key in state if key.startswith(f"{prefix}model.")]:
            del state[key]


def _keep_frozen_model(module: RAdaCLIP, state: dict, prefix: str, *_) -> None:
    """Complete a head-only state dict by the frozen model's own tensors; forget what other weights make stale."""
    given = any(key.startswith(f"{prefix}model.") for key in state)
    if given:
        module._text_features = None
    elif not any(p.requires_grad for p in module.model.parameters()):
        state.update(module.model.state_dict(prefix=f"{prefix}model."))


def _create(name: str, pretrained, precision: str, device, want_tokenizer: bool):
    """(model, preprocess, tokenizer, backbone) by open_clip's name."""
    open_clip = require("open_clip", "clip", "an open_clip model")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}; it takes one of {PRECISIONS}")
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
                stacklevel=3,
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
    tokenizer = open_clip.get_tokenizer(name) if want_tokenizer else None
    return model, _of_any_mode(preprocess), tokenizer, backbone


def _nearest(name: str, known: Sequence[str]) -> str:
    folded = {model.lower(): model for model in known}
    near = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=5, cutoff=0.4)]
    return f"the nearest are {near}" if near else "it takes one of open_clip.list_models()"


def _refuse_with_object(**arguments) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name}: got {value!r} with a model given as an object; it goes with a model's name only")


def _transform_of(model: OpenCLIP) -> Callable | None:
    config = getattr(model.visual, "preprocess_cfg", None)
    if config is None:
        return None
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return _of_any_mode(image_transform_v2(PreprocessCfg(**config), is_train=False))


def _of_any_mode(transform: Callable) -> Callable:
    """The transform of images of any mode. (open_clip's own lays transparency on black.)"""
    return require("torchvision.transforms", "clip", "an open_clip model").Compose([_rgb, transform])


def _rgb(image):
    from PIL.Image import Image

    return to_rgb(image) if isinstance(image, Image) else image  # transforms take tensors too


def _tokenizer_of(model: OpenCLIP) -> Callable:
    if _vocabulary_size(model) != CLIP_VOCABULARY:
        raise ValueError(
            "tokenizer: got None with a model whose vocabulary is not CLIP's; it takes the model's own, "
            "as open_clip.get_tokenizer makes it"
        )
    return require("open_clip", "clip", "an open_clip model").SimpleTokenizer(context_length=model.context_length)


def _vocabulary_size(model: OpenCLIP) -> int | None:
    return getattr(model, "vocab_size", getattr(getattr(model, "text", None), "vocab_size", None))


def _input_dtype(model: OpenCLIP) -> torch.dtype:
    """The dtype that the image tower takes: its first layer's. (Norms may keep float32 beside half precision.)"""
    layers = (module for module in model.visual.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    return next(layers).weight.dtype


def _image_width(model: OpenCLIP) -> int:
    """D, by encoding one black image: the towers do not agree on an attribute that holds it."""
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.zeros(1, 3, height, width, dtype=_input_dtype(model), device=model.logit_scale.device)
    with torch.no_grad():
        return model.eval().encode_image(image).shape[-1]
