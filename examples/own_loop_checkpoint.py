"""From a loop of one's own to `evaluate` and `predict`: a head trained on images, saved, used from the command line.

    python examples/own_loop_checkpoint.py --output runs/mine
    python -m rada evaluate --checkpoint runs/mine --data emoji
    python -m rada predict --checkpoint runs/mine --images PATH --output predictions.jsonl

The same by an open_clip model: ModelSpec("ViT-B-16", pretrained="openai").
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import rada
from rada import RAdaCLIP, RAdaHead
from rada.data import few_shot
from rada.data.classes import limit_classes
from rada.evaluate import evaluate_checkpoint
from rada.models import ModelSpec

ALPHA = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/mine"))
    given = parser.parse_args()

    torch.manual_seed(0)
    source = limit_classes(rada.load_source("emoji"), 20)
    index = few_shot(source.train.labels, 8, seed=1)
    encoders = ModelSpec("demo").open(torch.device("cpu"))  # frozen
    model = RAdaCLIP(encoders, RAdaHead(encoders.embed_dim), source.class_names)
    images = torch.stack([model.preprocess(source.train.images[i]) for i in index])  # [N, 3, H, W]
    labels = source.train.labels[index]

    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-3)
    for epoch in range(1, given.epochs + 1):
        model.train()  # frozen towers stay in eval mode
        for batch in torch.randperm(len(labels)).split(32):
            logits, penalty = model(images[batch], return_penalty=True)
            loss = F.cross_entropy(logits, labels[batch]) + ALPHA * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")

    rada.save(given.output, model.eval())
    results = evaluate_checkpoint(given.output, "emoji")
    for name in ("zero_shot", "rada"):
        print(f"{name}: {results[name]['all']:.1f} % of {results['test_items']['all']} test images")


if __name__ == "__main__":
    main()
