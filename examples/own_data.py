"""A run on images of one's own that are in memory, with a loss of one's own: a `Source`, and no file format.

    python examples/own_data.py --output runs/shapes

Any sequence of PIL images will do, such as a data set of torchvision's or of Hugging Face's without its labels.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import rada
from rada.data import Source, Split
from rada.report.tables import print_run
from rada.tuning import Tuning

SHAPES = {"circle": 0, "triangle": 3, "square": 4, "pentagon": 5}  # corners


def draw_split(name: str, per_class: int) -> Split:
    """Black shapes of random place, size and angle. Item names tell the splits apart."""
    rng, images, labels = random.Random(name), [], []
    for label, corners in enumerate(SHAPES.values()):
        for _ in range(per_class):
            image = Image.new("RGB", (64, 64), "white")
            circle = (rng.uniform(26, 38), rng.uniform(26, 38), rng.uniform(12, 24))
            draw = ImageDraw.Draw(image)
            if corners:
                draw.regular_polygon(circle, corners, rng.uniform(0, 360), fill="black")
            else:
                draw.circle(circle[:2], circle[2], fill="black")
            images.append(image)
            labels.append(label)
    return Split(torch.tensor(labels), images=images, names=tuple(f"{name}/{i}" for i in range(len(images))))


def loss(logits, labels, penalty, regularizer=0.0):
    """Cross-entropy with label smoothing. See `rada.losses.Loss`."""
    return F.cross_entropy(logits, labels, label_smoothing=0.1) + 0.1 * penalty + regularizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    source = Source("shapes", tuple(SHAPES), train=draw_split("train", 16), test=draw_split("test", 50))
    tuning = Tuning(epochs=given.epochs, lr=3e-3)
    results = rada.train(source, "demo", loss=loss, tuning=tuning, seeds=(1, 2), output=given.output, overwrite=True)
    print_run(results)


if __name__ == "__main__":
    main()
