"""The loop of plain_loop.py under Accelerate: mixed precision, and as many processes as `accelerate launch` starts.

    accelerate launch examples/accelerate_loop.py --epochs 20
    python examples/accelerate_loop.py --mixed-precision bf16

It takes `pip install accelerate`.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from plain_loop import ALPHA, CLASSES, LOGIT_SCALE, WIDTH, draw_features
from torch.utils.data import DataLoader, TensorDataset

from rada import RAdaHead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    given = parser.parse_args()

    set_seed(0)  # the same features and the same head in every process
    text = torch.randn(CLASSES, WIDTH)
    loader = DataLoader(TensorDataset(*draw_features(text, per_class=16)), batch_size=32, shuffle=True)
    test = DataLoader(TensorDataset(*draw_features(text, per_class=20)), batch_size=100)
    head = RAdaHead(WIDTH)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)

    accelerator = Accelerator(mixed_precision=given.mixed_precision)
    head, optimizer, loader, test = accelerator.prepare(head, optimizer, loader, test)
    text = text.to(accelerator.device)

    def accuracy() -> float:
        hits = []
        for features, labels in test:
            with torch.no_grad():
                predicted = head(features, text, LOGIT_SCALE).argmax(-1)
            hits.append(accelerator.gather_for_metrics(predicted == labels))
        return 100 * torch.cat(hits).float().mean().item()

    accelerator.print(f"before: test accuracy {accuracy():.1f} %")
    for epoch in range(1, given.epochs + 1):
        for features, labels in loader:
            logits, penalty = head(features, text, LOGIT_SCALE, return_penalty=True)
            loss = F.cross_entropy(logits, labels) + ALPHA * penalty
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy():.1f} %")


if __name__ == "__main__":
    main()
