"""From a data set to features: which model, on which device, with a bar."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rada.clip import RAdaCLIP
from rada.data import Split
from rada.data.source import Images
from rada.templates import DEFAULT_TEMPLATES

DEMO_MODEL = "demo"
ENCODE_BATCH = 128
# Fewer images than this are decoded sooner than worker processes start.
IMAGES_FOR_WORKERS = 512


@dataclass(frozen=True)
class ModelSpec:
    """Which encoders: what a checkpoint keeps to find them again.

    name: "demo" (the small model of `rada.demo`), or a name that open_clip takes.
    pretrained: a tag of open_clip's or the path of a checkpoint, as for `RAdaCLIP.from_open_clip`.
    templates: prompt templates.
    """

    name: str
    pretrained: str | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def open(self, class_names: Sequence[str], device: torch.device, **head_options: Any) -> RAdaCLIP:
        """The model, frozen, under a new head over the classes."""
        if self.name != DEMO_MODEL:
            return RAdaCLIP.from_open_clip(
                self.name,
                class_names,
                pretrained=self.pretrained,
                templates=self.templates,
                device=device,
                **head_options,
            )
        from rada.demo import load_demo_model

        if self.pretrained is not None:
            raise ValueError(f"pretrained: got {self.pretrained!r}; the model 'demo' brings its own weights")
        model, preprocess, tokenizer = load_demo_model(device)
        return RAdaCLIP.from_open_clip(
            model,
            class_names,
            templates=self.templates,
            preprocess=preprocess,
            tokenizer=tokenizer,
            device=device,
            backbone="rada-demo",
            **head_options,
        )


def choose_device(name: str) -> torch.device:
    """The torch device of that name; "auto" takes an accelerator that is there, else the CPU.

    Raises ValueError for a name that torch does not know and for a device that is not there.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: got {name!r}, which is not usable here ({reason}); 'auto' and 'cpu' are") from error
    return device


class Preprocessed(Dataset):
    """Images of a sequence at some positions, as the model takes them."""

    def __init__(self, images: Images, positions: Sequence[int], preprocess) -> None:
        self.images, self.positions, self.preprocess = images, positions, preprocess

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocess(self.images[self.positions[index]])


def encode_images(
    clip: RAdaCLIP,
    images: Images,
    indices: Tensor | None = None,
    *,
    description: str = "encode images",
    batch_size: int = ENCODE_BATCH,
    quiet: bool = False,
) -> Iterator[Tensor]:
    """Yield unit-length features [≤ batch_size, D] on the model's device of images[indices], in their order.

    images: PIL images, decoded when indexed; in worker processes where there are many.
    quiet: without a bar, for a caller that shows its own.
    """
    from tqdm import tqdm

    if clip.preprocess is None:
        raise ValueError("model: it came without an image transform; it takes one that open_clip knows")
    positions = range(len(images)) if indices is None else indices.tolist()
    many = len(positions) >= IMAGES_FOR_WORKERS and (os.cpu_count() or 1) > 1
    loader = DataLoader(
        Preprocessed(images, positions, clip.preprocess),
        batch_size,
        num_workers=min(8, (os.cpu_count() or 1) - 1) if many else 0,
    )
    device = clip.logit_scale.device
    with tqdm(total=len(positions), desc=description, unit="image", leave=False, disable=quiet) as bar:
        for batch in loader:
            with torch.no_grad():
                features = clip.encode_images(batch.to(device))
            bar.update(len(batch))
            yield features


def split_features(clip: RAdaCLIP | None, split: Split, indices: Tensor, description: str) -> Tensor:
    """Features [M, D] of a split's items at indices [M]: stored ones, or encoded by `clip`. On the CPU."""
    if split.features is not None:
        return split.features[indices]
    if clip is None or split.images is None:
        raise ValueError("clip: got None for a split without features; it takes the model that encodes its images")
    parts = [features.cpu() for features in encode_images(clip, split.images, indices, description=description)]
    return torch.cat(parts)
