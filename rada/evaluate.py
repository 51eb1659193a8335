"""Testing a stored head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rada.checkpoint import load_config, load_head
from rada.clip import RAdaCLIP
from rada.data import base_new, harmonic_mean, load_source, select_classes
from rada.encode import ModelSpec, choose_device, split_features
from rada.fused import RAdaHead
from rada.tune import Classes, accuracy, predict_labels


@dataclass(frozen=True)
class Trained:
    """A stored head with all that it takes to use it."""

    head: RAdaHead
    classes: Classes  # all K, on the head's device
    class_names: tuple[str, ...]
    spec: ModelSpec | None  # None: trained on features computed before
    config: dict
    device: torch.device

    def open_model(self) -> RAdaCLIP:
        """The encoders, checked to be the head's. Raises ValueError where it was trained on features."""
        if self.spec is None:
            raise ValueError(
                "checkpoint: its head was trained on features computed before; it takes features:PATH, not images"
            )
        clip = self.spec.open(self.class_names[:1], self.device, num_heads=1)
        if (clip.backbone, clip.head.embed_dim) != (self.config["backbone"], self.head.embed_dim):
            raise ValueError(
                f"checkpoint: got the backbone {clip.backbone!r} of width {clip.head.embed_dim}; it takes "
                f"{self.config['backbone']!r} of width {self.head.embed_dim}"
            )
        return clip


def load_trained(checkpoint: Path, *, device: str = "auto", backend: str = "auto") -> Trained:
    """The head in the folder `checkpoint`, as `rada.train` writes it; of a run's folder its first seed.

    Raises FileNotFoundError or ValueError for a folder without a whole checkpoint.
    """
    folder = Path(checkpoint)
    if not (folder / "head.json").exists() and (folder / "results.json").exists():
        seeds = sorted(folder.glob("seed-*/head.json"), key=lambda path: int(path.parent.name[5:]))
        if seeds:
            folder = seeds[0].parent
    config = load_config(folder)
    where = choose_device(device)
    head = load_head(folder, device=where, backend=backend).eval()
    path = folder / "classes.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it holds the classes that the head was trained with")
    with np.load(path) as stored:
        text = torch.from_numpy(stored["text_features"]).to(where, head.k_proj.weight.dtype)
        bias = float(stored["logit_bias"]) if "logit_bias" in stored.files else None
        classes = Classes(text, float(stored["logit_scale"]), bias)
        names = tuple(stored["class_names"].tolist())
    model = config["extra"].get("model")
    spec = None if model is None else ModelSpec(model["name"], model["pretrained"], tuple(model["templates"]))
    return Trained(head, classes, names, spec, config, where)


def evaluate_checkpoint(
    checkpoint: Path,
    data: str | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    seed: int = 0,
    skip_bad: bool = False,
) -> dict:
    """Accuracies in percent of a stored head and of zero-shot on the test split of a data set with its classes.

    data: default: what the head was trained on. seed: of a split that the data come without, as given to training.

    Returns data, attribution, device, backend, and under zero_shot and rada: base, new (each among its own classes),
    h, all (among all classes). Raises ValueError where the data have other classes than the checkpoint.
    """
    trained = load_trained(checkpoint, device=device, backend=backend)
    source = load_source(data or trained.config["extra"]["data"], seed=seed, skip_bad=skip_bad)
    position = {name: i for i, name in enumerate(source.class_names)}
    missing = [name for name in trained.class_names if name not in position]
    if missing:
        raise ValueError(f"data: {source.name} has no class {missing[0]!r}; it takes the checkpoint's classes")
    test = select_classes(source.test, [position[name] for name in trained.class_names])
    clip = trained.open_model() if test.features is None else None
    features = split_features(clip, test, torch.arange(len(test)), "encode test images")
    if features.shape[1] != trained.head.embed_dim:
        raise ValueError(
            f"data: got features of width {features.shape[1]}; the checkpoint takes {trained.head.embed_dim}"
        )
    base, new = base_new(len(trained.class_names))
    halves = {"base": base, "new": new, "all": torch.arange(len(trained.class_names))}

    def scores(head: RAdaHead | None) -> dict[str, float]:
        values = {name: _accuracy(features, test.labels, trained.classes, ids, head) for name, ids in halves.items()}
        return {**values, "h": harmonic_mean(values["base"], values["new"])}

    return {
        "data": source.name,
        "attribution": source.attribution,
        "device": str(trained.device),
        "backend": str(trained.head.backend_for(trained.classes.text)),
        "zero_shot": scores(None),
        "rada": scores(trained.head),
    }


def _accuracy(features: Tensor, labels: Tensor, classes: Classes, ids: Tensor, head: RAdaHead | None) -> float:
    """Of the items of the classes `ids`, which ascend, among these classes."""
    mine = torch.isin(labels, ids)
    predicted = ids[predict_labels(features[mine], classes.select(ids), head)]
    return accuracy(predicted, labels[mine])
