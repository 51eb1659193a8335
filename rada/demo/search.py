"""Chooses epochs, rate and α of the demo, `rada.data.emoji.RECOMMENDED`, without its test images and new classes.

    python -m rada.demo.search

The base classes of the default run are cut in two at random, pseudo-base and pseudo-new. A head is trained on a few
shots of the pseudo-base classes and measured on training images outside the shots, of either half among its own
classes. Then the halves change places. Of the grid the setting with the highest H of the mean accuracies is chosen.
search.md beside this file keeps the table that it printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import torch
from torch import Tensor
from tqdm import tqdm

from rada.classification import Classes, Labelled, accuracy, predict_labels
from rada.data import Split, base_new, few_shot, h_of_means, load_source, recommended, select_classes, subset
from rada.data.classes import limit_classes
from rada.data.source import Recommended
from rada.encoders import split_features
from rada.fused import RAdaHead
from rada.models import DEMO_MODEL, ModelSpec
from rada.tuning import Tuning, tune_head

LRS = (1e-3, 3e-3, 1e-2)
ALPHAS = (0.0, 0.3, 1.0, 3.0, 10.0)
SEEDS = (1, 2, 3)
# Half the classes and half the batch: as many steps, and as many passes over the images, as the default run makes.
BATCH_SIZE = Tuning.batch_size // 2


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rada.demo.search", description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, nargs="+", default=LRS, help=f"learning rates, by default {LRS}")
    parser.add_argument("--alpha", type=float, nargs="+", default=ALPHAS, help=f"α, by default {ALPHAS}")
    parser.add_argument("--epochs", type=int, nargs="+", default=(Tuning.epochs,), help="passes over the shots")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="a cut and two trainings each")
    parser.add_argument("--shots", type=int, default=Recommended.shots, help="training images per class")
    args = parser.parse_args()

    grid = [
        Tuning(epochs=epochs, batch_size=BATCH_SIZE, lr=lr, alpha=alpha)
        for epochs in args.epochs
        for lr in args.lr
        for alpha in args.alpha
    ]
    images, classes = base_classes()
    cuts = list(folds(images, classes, args.seeds, args.shots))
    print("| epochs | lr | α | pseudo-base | pseudo-new | H of the means |\n| --- | --- | --- | --- | --- | --- |")
    print(f"| zero-shot | | | {line([measure(fold, None) for fold in cuts])}")
    scores: dict[Tuning, float] = {}
    for tuning in tqdm(grid, desc="search", unit="setting"):
        measured = [measure(fold, train(fold, tuning)) for fold in cuts]
        tqdm.write(f"| {tuning.epochs} | {tuning.lr:g} | {tuning.alpha:g} | {line(measured)}")
        scores[tuning] = h_of_means(*columns(measured))
    best = max(scores, key=lambda tuning: scores[tuning])
    print(f"\nchosen: epochs {best.epochs}, lr {best.lr:g}, α {best.alpha:g}")


def base_classes() -> tuple[Split, Classes]:
    """The training images of the default run's base classes, with their features [N, D], and these classes."""
    source = limit_classes(load_source("emoji"), recommended("emoji").max_classes)
    base, _ = base_new(len(source.class_names))
    images = select_classes(source.train, base)
    encoders = ModelSpec(DEMO_MODEL).open(torch.device("cpu"))
    features = split_features(encoders, images, torch.arange(len(images)), "encode training images")
    return replace(images, features=features), encoders.classes([source.class_names[i] for i in base])


@dataclass(frozen=True)
class Fold:
    """One way of a cut. classes, images: of "base" and "new", the pseudo-base and the pseudo-new classes."""

    seed: int
    shots: Labelled  # of the pseudo-base classes
    classes: dict[str, Classes]
    images: dict[str, Labelled]  # none of them a shot


def folds(images: Split, classes: Classes, seeds: Sequence[int], shots: int) -> Iterator[Fold]:
    """For each seed both ways of a random cut of the classes in halves."""
    for seed in seeds:
        ids = torch.randperm(len(classes.text), generator=torch.Generator().manual_seed(seed))
        cut = [half.sort().values for half in ids.tensor_split(2)]
        taken = few_shot(images.labels, shots, seed)
        rest = torch.ones(len(images), dtype=torch.bool).index_fill(0, taken, False).nonzero().squeeze(1)
        for halves in (cut, cut[::-1]):
            named = dict(zip(("base", "new"), halves, strict=True))
            yield Fold(
                seed,
                _labelled(images, taken, named["base"]),
                {name: classes.select(half) for name, half in named.items()},
                {name: _labelled(images, rest, half) for name, half in named.items()},
            )


def train(fold: Fold, tuning: Tuning) -> RAdaHead:
    torch.manual_seed(fold.seed)
    head = RAdaHead(fold.shots.features.shape[1])
    return tune_head(head, fold.shots, fold.classes["base"], tuning, seed=fold.seed)


def measure(fold: Fold, head: RAdaHead | None) -> dict[str, float]:
    """Accuracy in percent of each half among its own classes; head None: zero-shot."""
    return {
        name: accuracy(predict_labels(features, fold.classes[name], head), labels)
        for name, (features, labels) in fold.images.items()
    }


def line(measured: Sequence[dict[str, float]]) -> str:
    """The last three cells of a row: mean ± std over the trainings, and H."""
    cells = [f"{fmean(column):.2f} ± {stdev(column):.2f}" for column in columns(measured)]
    return f"{' | '.join(cells)} | {h_of_means(*columns(measured)):.2f} |"


def columns(measured: Sequence[dict[str, float]]) -> list[list[float]]:
    return [[row[name] for row in measured] for name in ("base", "new")]


def _labelled(images: Split, indices: Tensor, classes: Tensor) -> Labelled:
    chosen = select_classes(subset(images, indices), classes)
    assert chosen.features is not None
    return Labelled(chosen.features, chosen.labels)


if __name__ == "__main__":
    main()
