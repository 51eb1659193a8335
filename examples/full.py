"""Full fine-tuning of towers and head on images, then WiSE-FT: old and new weights mixed as validation likes best.

    python examples/full.py --epochs 5 --output runs/full

A run that was stopped goes on from the last epoch that --output holds.
"""

import argparse
from pathlib import Path

import torch

import rada
from rada import RAdaCLIP, RAdaHead
from rada.classification import accuracy, predict_labels
from rada.data import Split, few_shot, subset
from rada.data.classes import limit_classes
from rada.encoders import split_features
from rada.models import ModelSpec
from rada.tuning import FineTuner, FullTuning, wise_ft
from rada.tuning.interpolation import interpolate, snapshot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/full"))
    given = parser.parse_args()

    source = limit_classes(rada.load_source("emoji"), 20)
    drawn = few_shot(source.train.labels, 12, seed=1).view(-1, 12)  # a class a row
    train, val = (subset(source.train, part.flatten()) for part in drawn.split([8, 4], dim=1))

    torch.manual_seed(0)
    encoders = ModelSpec("demo").open(torch.device("cpu"))
    encoders.model.requires_grad_(True)
    model = RAdaCLIP(encoders, RAdaHead(encoders.embed_dim), source.class_names)
    start = snapshot(model)

    def measured(split: Split) -> float:
        features = split_features(model, split, torch.arange(len(split)), "encode")
        classes = model.classes(source.class_names)
        return accuracy(predict_labels(features, classes, model.head), split.labels)

    print(f"before: test accuracy {measured(source.test):.1f} %")
    tuning = FullTuning(epochs=given.epochs, lr=1e-4)
    tuner = FineTuner(model, train.images, train.labels, tuning, folder=given.output, on_epoch=print)
    tuner.resume()
    tuner.run()
    print(f"fine-tuned: test accuracy {measured(source.test):.1f} %")

    curve = wise_ft(model, start, lambda: {"val": measured(val)}, alphas=(0, 0.25, 0.5, 0.75, 1))
    best = max(curve, key=lambda row: row["val"])
    interpolate(model, start, snapshot(model), best["alpha"])
    print(f"{best['alpha']:g} of the way, by validation images: test accuracy {measured(source.test):.1f} %")
    rada.save(given.output, model)


if __name__ == "__main__":
    main()
