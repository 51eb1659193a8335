"""Encoders of images and text, with or without a head on top: class features, image features, freezing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rada.cache import FeatureCache, Shelf
from rada.classification import Classes
from rada.data.decoded import Batch, Decoded
from rada.data.record import names_of
from rada.data.source import Images, Split
from rada.distributed import in_shares, own_device
from rada.templates import DEFAULT_TEMPLATES, check_templates, fill

# Prompts per call of the text tower: large enough to keep a device busy, small enough for any memory.
PROMPTS_PER_BATCH = 256
IMAGES_PER_BATCH = 128

Extractor = TypeVar("Extractor", bound="FeatureExtractor")


class Encoder(Protocol):
    """The members of an encoder, by open_clip's names. It is a module; its image tower is `visual`.

    visual.image_size: an int, or height and width. encode_image: images [B, 3, H, W] to features [B, D].
    encode_text: token ids [N, L] to features [N, D]. logit_scale: 0-d or [1], a logarithm.
    logit_bias: SigLIP's, 0-d or [1]; it may be None or missing.
    """

    visual: Any
    logit_scale: Tensor
    logit_bias: Tensor | None

    def encode_image(self, image: Tensor, /) -> Tensor: ...

    def encode_text(self, text: Tensor, /) -> Tensor: ...


class FeatureExtractor(nn.Module):
    """An encoder with its image transform, tokenizer and prompt templates. `rada.models` opens one by its name.

    model: the `Encoder`.
    tokenizer: strings -> token ids.
    templates: T format strings with "{}" or "{class}".
    preprocess: the evaluation transform, PIL image -> [3, H, W], or None where the model came without one.
    backbone: the name that checkpoints store. Default: the model's class.

    spec: the `rada.models.ModelSpec` that opened it; None: it was made of objects, and no checkpoint can open it again.
    amp: the dtype that the image tower is cast to by autocast; None (default): to none of its own.
    batch_size: images per call of the image tower. Default 128.
    workers: processes that decode images. Default None: as many as are worth their start.
    cache: where image features are kept between runs, see `rada.cache`. Default None: nowhere.

    A tower is frozen if none of its parameters requires a gradient: it runs without gradients and stays in eval mode
    even after `train()`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Callable,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        preprocess: Callable | None = None,
        backbone: str | None = None,
    ):
        super().__init__()
        self.model: Any = model  # an Encoder and a module; Python has no intersection types
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.templates = check_templates(templates)
        self.backbone = type(model).__name__ if backbone is None else backbone
        self.spec: Any = None
        self.amp: torch.dtype | None = None
        self.batch_size = IMAGES_PER_BATCH
        self.workers: int | None = None
        self.cache: FeatureCache | None = None
        self.train()

    def _like(self, other: FeatureExtractor, model: nn.Module) -> None:
        """Set up as another one, over `model` in place of its own, without its cache."""
        FeatureExtractor.__init__(
            self,
            model,
            tokenizer=other.tokenizer,
            templates=other.templates,
            preprocess=other.preprocess,
            backbone=other.backbone,
        )
        for name in ("spec", "amp", "batch_size", "workers"):
            setattr(self, name, getattr(other, name))

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit-length image features [B, D], in the dtype of features, of preprocessed images [B, 3, H, W]."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images: got {type(images).__name__}; it takes a tensor [B, 3, H, W], as preprocess makes")
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(f"images: got {images.dtype} {list(images.shape)}; it takes floating [B, 3, H, W]")
        amp = nullcontext() if self.amp is None else torch.autocast(images.device.type, self.amp)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.visual_trains):
            with amp:
                features = self.model.encode_image(images.to(self._input_dtype))
            return F.normalize(features.to(self.feature_dtype), dim=-1)

    def tokenize_classes(self, class_names: Sequence[str]) -> Tensor:
        """Token ids [K, T, L] of the K names in the T templates. Raises TypeError or ValueError for bad names."""
        if isinstance(class_names, str):
            raise TypeError(f"class_names: got the string {class_names!r}; it takes a sequence of names")
        if not hasattr(self.model, "encode_text"):
            raise ValueError(
                f"model: got {self.backbone}, which has no text tower (encode_text); it takes one that has, or "
                "features computed before, with their text_features"
            )
        class_names = tuple(class_names)
        bad = [name for name in class_names if not isinstance(name, str) or not name.strip()]
        if bad or not class_names:
            raise ValueError(f"class_names: got {bad[:8] or 'none'}; it takes at least one name, none empty")
        tokens = self.tokenizer([fill(template, name) for name in class_names for template in self.templates])
        size = vocabulary_size(self.model)
        if size is not None and int(tokens.max()) >= size:
            raise ValueError(
                f"tokenizer: got token id {int(tokens.max())}; the model takes ids below {size}: pass its own tokenizer"
            )
        return tokens.unflatten(0, (len(class_names), len(self.templates)))

    def encode_classes(self, tokens: Tensor) -> Tensor:
        """Class features [K, D] of unit length, in the dtype of features, of token ids [K, T, L].

        The mean of the templates' unit vectors, normalised; with gradients only while the text tower trains.
        """
        keep, device = not self.text_trains, self.logit_scale.device
        batches = tokens.split(max(1, PROMPTS_PER_BATCH // len(self.templates)))
        # A bar where it is long: once per set of classes, not in every step of a tower that trains.
        quiet = not keep or len(batches) < 4
        from tqdm import tqdm  # heads alone do without it

        rows = []
        # Features to be kept must serve any later call: no inference tensor, nothing rounded by an autocast.
        with (
            torch.inference_mode(torch.is_inference_mode_enabled() and not keep),
            torch.set_grad_enabled(torch.is_grad_enabled() and not keep),
            torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type) and not keep),
        ):
            for batch in tqdm(batches, "encode classes", unit="batch", leave=False, disable=quiet):
                embeddings = self.model.encode_text(batch.flatten(0, 1).to(device))  # [n·T, D]
                embeddings = F.normalize(embeddings.to(self.feature_dtype), dim=-1).unflatten(0, batch.shape[:2])
                rows.append(F.normalize(embeddings.mean(1), dim=-1))
            features = torch.cat(rows)
        if features.shape[1] != self.embed_dim:
            raise ValueError(
                f"model: got text features of width {features.shape[1]} but image features of width "
                f"{self.embed_dim}; both towers must agree"
            )
        return features

    def classes(self, class_names: Sequence[str]) -> Classes:
        """The classes of these names, without gradients."""
        return self.among(self.encode_classes(self.tokenize_classes(class_names)).detach())

    def among(self, text_features: Tensor) -> Classes:
        """The classes of these features [K, D], with the encoders' scale and bias."""
        bias = self.logit_bias
        return Classes(text_features, self.logit_scale.item(), None if bias is None else bias.item())

    @property
    def logit_scale(self) -> Tensor:
        """The exponentiated scale, 0-d float32."""
        return self.model.logit_scale.float().exp().reshape(())

    @property
    def logit_bias(self) -> Tensor | None:
        """SigLIP's bias, 0-d float32, or None."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.float().reshape(())

    @property
    def feature_dtype(self) -> torch.dtype:
        """The dtype that features are cast to."""
        return torch.float32

    @cached_property
    def embed_dim(self) -> int:
        """D, by encoding one black image: the towers do not agree on an attribute that holds it."""
        size = self.model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        image = torch.zeros(1, 3, height, width, dtype=self._input_dtype, device=self.logit_scale.device)
        mode = self.training
        self.eval()
        with torch.no_grad():
            features = self.model.encode_image(image)
        self.train(mode)
        return features.shape[-1]

    @property
    def visual_trains(self) -> bool:
        """Whether a parameter of the image tower requires a gradient."""
        return any(p.requires_grad for p in self.model.visual.parameters())

    @property
    def text_trains(self) -> bool:
        """Whether a parameter outside the image tower does, apart from the scale and the bias."""
        return any(
            p.requires_grad
            for name, p in self.model.named_parameters()
            if not name.startswith("visual.") and name not in ("logit_scale", "logit_bias")
        )

    def train(self: Extractor, mode: bool = True) -> Extractor:
        """Set the training mode; frozen towers stay in eval mode."""
        super().train(mode)
        for child in self.model.children():
            child.train(mode and any(p.requires_grad for p in child.parameters()))
        self.model.training = mode and (self.visual_trains or self.text_trains)
        return self

    def fingerprint(self) -> str:
        """SHA-256 of the names, shapes and values of the model's parameters and buffers, in hexadecimal."""
        digest = hashlib.sha256()
        hash_tensors(digest, self.model.state_dict())
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        """What decides image features: model, fingerprint, preprocessing and precision, in words."""
        return {
            "model": self.backbone,
            "fingerprint": self.fingerprint(),
            # A function's repr has its address, which no two processes share.
            "preprocessing": re.sub(r" at 0x[0-9a-f]+", "", repr(self.preprocess)),
            "precision": str(self.amp or self._input_dtype).removeprefix("torch."),
        }

    def open_shelf(self) -> Shelf | None:
        """The part of the cache with these encoders' features. None: without a cache, or where none would be right.

        A tower that trains changes; of encoders made of objects nothing names the preprocessing.
        """
        if self.cache is None or self.visual_trains or self.spec is None:
            return None
        return self.cache.shelf({**self.identity(), "device": self.logit_scale.device.type})

    @property
    def _input_dtype(self) -> torch.dtype:
        """The dtype that the image tower takes: its first layer's. (Norms may keep float32 beside half precision.)"""
        layers = (module for module in self.model.visual.modules() if isinstance(module, nn.Conv2d | nn.Linear))
        return next(layers).weight.dtype


def hash_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Update a digest by the names, shapes, dtypes and values of tensors, by name."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        digest.update(raw(tensor))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def vocabulary_size(model: Any) -> int | None:
    """The number of token ids that a model takes, or None if unknown."""
    return getattr(model, "vocab_size", getattr(getattr(model, "text", None), "vocab_size", None))


def choose_device(name: str) -> torch.device:
    """The torch device of that name; "auto" takes an accelerator that is there, else the CPU. Of torchrun's processes
    each has its own.

    Raises ValueError for a name that torch does not know and for a device that is not there.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return own_device(accelerator or torch.device("cpu"))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: got {name!r}, which is not usable here ({reason}); 'auto' and 'cpu' are") from error
    return own_device(device)


class Encoded(NamedTuple):
    """A batch of encoded images.

    rows: positions of the n readable images in the sequence, in the order asked for. features: [n, D], of unit length,
    on the model's device. bad: the reason of each unreadable one, by its position.
    """

    rows: list[int]
    features: Tensor
    bad: dict[int, str]

    def check(self) -> None:
        """Raise ValueError for the first unreadable image."""
        for reason in self.bad.values():
            raise ValueError(f"images: {reason}; skip_bad (--skip-bad) leaves such files out")


def encode_batches(
    extractor: FeatureExtractor,
    images: Images,
    batches: Sequence[Sequence[int]],
    *,
    description: str = "encode images",
    quiet: bool = False,
) -> Iterator[Encoded]:
    """Encode batches of positions in `images`, in their order. Unreadable images are recorded.

    images: PIL images, decoded when indexed; in worker processes where there are many. A few batches are decoded ahead.
        Where the extractor has a cache and the images their contents, what is in the cache is neither decoded nor
        encoded, and the rest is added.
    quiet: without a bar, for a caller that shows its own.

    Raises ValueError for a model without an image transform.
    """
    if extractor.preprocess is None:
        raise ValueError("model: it came without an image transform; it takes one that open_clip knows")
    from tqdm import tqdm

    count = sum(map(len, batches))
    shelf = extractor.open_shelf() if hasattr(images, "content") else None
    decoded = Decoded(images, extractor.preprocess, None if shelf is None else shelf.known)
    loader = decoded.batches(batches, extractor.workers)
    try:
        with tqdm(total=count, desc=description, unit="image", leave=False, disable=quiet) as bar:
            for batch in loader:
                features = _features(extractor, batch, shelf)
                bar.update(len(batch.rows) + len(batch.bad))
                yield Encoded([item.position for item in batch.rows], features, batch.bad)
    finally:
        if shelf is not None:
            shelf.flush()


def _features(extractor: FeatureExtractor, batch: Batch, shelf: Shelf | None) -> Tensor:
    """The features [n, D] of a batch's readable images: of fresh ones encoded, of the others from the shelf."""
    device = extractor.logit_scale.device
    if not batch.rows:
        return torch.empty(0, extractor.embed_dim, dtype=extractor.feature_dtype, device=device)
    fresh = torch.empty(0)
    if batch.images is not None:
        with torch.no_grad():
            fresh = extractor.encode_images(batch.images.to(device))
    if shelf is None:
        return fresh
    keys = [item.key for item in batch.rows]
    shelf.add([keys[place] for place in batch.fresh], fresh)
    if len(fresh) == len(keys):
        return fresh
    stored = sorted(set(range(len(keys))) - set(batch.fresh))
    rows = shelf.rows([keys[place] for place in stored]).to(device, extractor.feature_dtype)
    whole = rows.new_empty(len(keys), rows.shape[1])
    whole[stored] = rows
    if batch.fresh:
        whole[batch.fresh] = fresh
    return whole


def in_batches(positions: Sequence[int], size: int) -> list[Sequence[int]]:
    return [positions[first : first + size] for first in range(0, len(positions), size)]


class Readable(NamedTuple):
    """Features of the items of a split that could be read.

    kept: [n] their indices in the split. features: [n, D], on the CPU. skipped: the names of the others.
    """

    kept: Tensor
    features: Tensor
    skipped: list[str]


def readable_features(
    extractor: FeatureExtractor | None, split: Split, indices: Tensor, description: str, *, skip_bad: bool = False
) -> Readable:
    """The features of a split's items at indices [M], as `split_features` gives them; each rank encodes its share.

    skip_bad: leave out what cannot be read. Default False: raise ValueError for the first. Raises where none is left.
    """
    if split.features is not None:
        features = split_features(None, split, indices, description, skip_bad=skip_bad)
    else:
        features = in_shares(
            len(indices), lambda own: split_features(extractor, split, indices[own], description, skip_bad=skip_bad)
        )
    if not skip_bad:
        return Readable(indices, features, [])
    good = ~features.isnan().any(1)
    names = names_of(split)
    skipped = [names[i] for i in indices[~good].tolist()]
    if len(skipped) == len(indices):
        raise ValueError(f"data: none of {len(indices)} items could be read, the first is {next(iter(skipped), None)}")
    return Readable(indices[good], features[good], skipped)


def split_features(
    extractor: FeatureExtractor | None, split: Split, indices: Tensor, description: str, *, skip_bad: bool = False
) -> Tensor:
    """Features [M, D] of a split's items at indices [M]: stored ones, or encoded by `extractor`. On the CPU.

    skip_bad: give NaN for an unreadable image and for a stored row that is not finite. Default False: raise ValueError.
    """
    if split.features is not None:
        stored = split.features[indices]
        bad = ~stored.isfinite().all(1)
        if bad.any() and not skip_bad:
            first = names_of(split)[int(indices[bad][0])]
            raise ValueError(f"features: item {first}: NaN or infinity; skip_bad (--skip-bad) leaves such rows out")
        return stored.masked_fill(bad[:, None], float("nan"))
    if extractor is None or split.images is None:
        raise ValueError("extractor: got None for a split without features; it takes the encoder of its images")
    batches, rows = in_batches(indices.tolist(), extractor.batch_size), []
    for positions, encoded in zip(
        batches, encode_batches(extractor, split.images, batches, description=description), strict=True
    ):
        if not skip_bad:
            encoded.check()
        whole = encoded.features.new_full((len(positions), encoded.features.shape[1]), float("nan")).cpu()
        whole[[position not in encoded.bad for position in positions]] = encoded.features.cpu()
        rows.append(whole)
    return torch.cat(rows)
