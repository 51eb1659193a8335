"""A training loop of one's own over features of frozen encoders: the head is a module like any other.

    python examples/plain_loop.py --epochs 20

The features are drawn: an image's are its class's text features and noise, most of it in half of the dimensions. The
head learns which products of image and text features to trust.
"""

import argparse

import torch
import torch.nn.functional as F

from rada import RAdaHead

CLASSES, WIDTH, LOGIT_SCALE, ALPHA = 20, 64, 50.0, 0.1


def draw_features(text: torch.Tensor, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image features [N, D] and labels [N]."""
    labels = torch.arange(len(text)).repeat_interleave(per_class)
    noise = torch.randn(len(labels), text.shape[1])
    noise[:, ::2] *= 4
    return text[labels] + noise, labels


@torch.no_grad()
def accuracy(head: RAdaHead, features: torch.Tensor, labels: torch.Tensor, text: torch.Tensor) -> float:
    """In percent."""
    return 100 * (head(features, text, LOGIT_SCALE).argmax(-1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    text = torch.randn(CLASSES, WIDTH)
    features, labels = draw_features(text, per_class=16)
    test = draw_features(text, per_class=20)

    head = RAdaHead(WIDTH)  # its logits are zero-shot's until it is trained
    print(f"before: test accuracy {accuracy(head, *test, text):.1f} %")
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(labels)).split(32):
            logits, penalty = head(features[batch], text, LOGIT_SCALE, return_penalty=True)
            loss = F.cross_entropy(logits, labels[batch]) + ALPHA * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy(head, *test, text):.1f} %")


if __name__ == "__main__":
    main()
