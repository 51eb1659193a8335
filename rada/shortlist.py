"""A shortlist of classes for inference: the head among each image's best zero-shot classes alone.

    logits, indices = shortlist_logits(head, image_features, classes, 50)
    labels = indices.gather(1, logits.argmax(1, keepdim=True))
    print(f"{100 * agreement(head, features, classes, 50):.1f} % as the full head")

It is another function than the full head, whose softmax runs over all K·K pairs of classes: here it runs over m·m
pairs, and a class outside the shortlist cannot win. How often both choose the same class depends on head and data:
`agreement` measures it. The work of an image falls from K² to m².
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rada.classification import Classes, predict_labels

SAMPLES = 256


@torch.no_grad()
def shortlist_logits(head: nn.Module, image: Tensor, classes: Classes, m: int) -> tuple[Tensor, Tensor]:
    """The head's logits [B, m] among the m classes with an image's largest zero-shot logits, without gradients.

    head: any module with RAdaHead's call. image: [B, D] features on the classes' device, in their dtype.
    m: 1 to K.

    Returns logits [B, m] and int64 indices [B, m] of their classes, both in the order of the zero-shot logits, largest
    first. Raises ValueError for another m.
    """
    count = len(classes.text)
    if isinstance(m, bool) or not isinstance(m, int) or not 1 <= m <= count:
        raise ValueError(f"m: got {m!r}; it takes a number of classes, 1 to {count}")
    indices = classes.zero_shot(image).topk(m).indices
    # Each image has classes of its own, so each is a call of its own.
    logits = [head(image[i : i + 1], *classes.select(ids))[0] for i, ids in enumerate(indices)]
    return torch.stack(logits) if logits else image.new_empty(0, m), indices


@torch.no_grad()
def agreement(
    head: nn.Module, features: Tensor, classes: Classes, m: int, *, samples: int = SAMPLES, seed: int = 0
) -> float:
    """The share of images, 0 to 1, for which the shortlist's best class is the full head's.

    features: [N, D], of which at most `samples` are drawn at random by the seed. Other arguments and errors as of
        `shortlist_logits`; ValueError without features too.
    """
    if not len(features) or samples < 1:
        raise ValueError(f"features, samples: got {len(features)} and {samples}; it takes at least one of each")
    drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:samples]
    image = features[drawn].to(classes.text.device, classes.text.dtype)
    logits, indices = shortlist_logits(head, image, classes, m)
    mine = indices.gather(1, logits.argmax(1, keepdim=True)).squeeze(1).cpu()
    return (mine == predict_labels(image, classes, head)).double().mean().item()
