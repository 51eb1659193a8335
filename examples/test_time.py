"""Test-time training: a head adapts to each image by itself, without its label, and is then as before.

python examples/test_time.py --images 50
"""

import argparse

import torch

from rada import RAdaHead, load_source
from rada.adapt import view_features
from rada.data import subset
from rada.data.classes import limit_classes
from rada.models import ModelSpec
from rada.tuning import Adaptation, TestTimeAdapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--views", type=int, default=64)
    given = parser.parse_args()

    torch.manual_seed(0)
    source = limit_classes(load_source("emoji"), 100)
    test = subset(source.test, torch.randperm(len(source.test))[: given.images])

    encoders = ModelSpec("demo").open(torch.device("cpu"))
    head = RAdaHead(encoders.embed_dim).eval()  # untrained: zero-shot
    adapter = TestTimeAdapter(head, encoders.classes(source.class_names), Adaptation(steps=1, lr=5e-3))
    hits = {"zero-shot": 0, "adapted": 0}
    done = 0
    for views in view_features(encoders, test.images, given.views):  # [n, V, D], the plain view first
        adapted = adapter(views)
        labels = test.labels[done : done + len(views)]
        hits["zero-shot"] += int((adapted.zero_shot.argmax(-1) == labels).sum())
        hits["adapted"] += int((adapted.logits.argmax(-1) == labels).sum())
        done += len(views)
    for name, count in hits.items():
        print(f"{name}: {100 * count / done:.1f} % of {done} images")


if __name__ == "__main__":
    main()
