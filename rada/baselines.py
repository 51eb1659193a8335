"""Few-shot baselines on CLIP features, to stand beside RAda.

    model = BASELINES["Tip-Adapter-F"].fit(train, classes, seed=1, val=val)
    labels = predict_labels(features, classes, model)

Each is fitted on the features that RAda is trained on, and gives a module with RAdaHead's call:
model(image_features [B, D], text_features [K, D], logit_scale, logit_bias) -> logits [B, K]. Features are divided by
their norm first. What a method must choose, it chooses by the accuracy on `val`, images of the training split; without
them it takes the setting that its paper gives. Nothing is chosen by test images, and no iterate but the last is kept.

CLIP-Adapter compares images with any text features. The others know the classes they were fitted on: they answer for
these, in any order and number, and of no other class.

The published numbers of Tip-Adapter-F and CLIP-Adapter come from a new random crop of each image in every epoch. On
features computed once there is none.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rada.classification import Classes, Labelled, accuracy, predict_labels

# CLIP's own probe takes 0.316 for features of norm 10; a norm of 1 asks for 10² as much.
PROBE_C = 31.6
PROBE_CS = (0.1, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5)
LPPP_STEPS = 300
LPPP_MULTIPLIER = 250.0
TIP_ALPHA, TIP_BETA = 1.0, 5.5
# Geometric, over the ranges that the release searches on one data set or another.
TIP_GRID = tuple(0.1 * 500 ** (i / 31) for i in range(32))  # 0.1 to 50
CLIP_ADAPTER_RATIO = 0.2
CLIP_ADAPTER_REDUCTION = 4


class Fit(Protocol):
    """Fits a baseline.

    train: image features [N, D] and labels [N] in 0..K-1. classes: the K classes. val: as train, to choose settings by.
    seed: of random starts and of the order of the images.
    """

    def __call__(self, train: Labelled, classes: Classes, *, seed: int, val: Labelled | None = None) -> nn.Module: ...


class Baseline(NamedTuple):
    fit: Fit
    unseen: bool  # it answers for classes that it was not fitted on
    source: str


def class_rows(text: Tensor, fitted: Tensor) -> Tensor | None:
    """Where the classes of text features [K', D] stand among `fitted` [K, D]: [K'] int64; None where one does not.

    Classes of the same features keep their order: the first stands for the first of them.
    """
    if text.shape == fitted.shape and torch.equal(text, fitted):
        return torch.arange(len(fitted), device=fitted.device)
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(_row_bytes(fitted)):
        places.setdefault(row, []).append(place)
    seen: Counter[bytes] = Counter()
    rows = []
    for row in _row_bytes(text):
        same = places.get(row)
        if same is None:
            return None
        rows.append(same[seen[row] % len(same)])
        seen[row] += 1
    return torch.tensor(rows, device=fitted.device)


def _row_bytes(features: Tensor) -> list[bytes]:
    return [row.tobytes() for row in features.detach().contiguous().cpu().view(torch.uint8).numpy()]


def class_means(train: Labelled, count: int) -> Tensor:
    """Stand-ins for text features [K, D], for features that come without any: each class's mean training image.

    Every image is divided by its norm, and so is each mean. It is the classifier of Snell et al. (NeurIPS 2017, arXiv
    1703.05175), without their training. docs/protocols.md says what it does to a table.

    Raises ValueError for a class without images.
    """
    features = F.normalize(train.features, dim=-1)
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, train.labels, features)
    empty = (torch.bincount(train.labels, minlength=count) == 0).nonzero().flatten()
    if len(empty):
        raise ValueError(f"train: got no image of {len(empty)} of {count} classes, the first is {int(empty[0])}")
    return F.normalize(sums, dim=-1)


class FittedClasses(nn.Module):
    """What knows the classes it was fitted on, by their text features [K, D]."""

    def __init__(self, text: Tensor):
        super().__init__()
        self.register_buffer("text", text)
        self.text: Tensor

    def rows(self, text: Tensor) -> Tensor:
        """Where classes stand among the fitted ones. Raises ValueError for one that does not."""
        rows = class_rows(text, self.text)
        if rows is None:
            raise ValueError(
                f"text_features: got a class that {type(self).__name__} was not fitted on; it takes those of its "
                f"{len(self.text)} classes, in any order"
            )
        return rows


class LinearProbe(FittedClasses):
    """logits = f Wᵀ + b."""

    def __init__(self, text: Tensor, weight: Tensor, bias: Tensor):
        super().__init__(text)
        self.register_buffer("weight", weight)  # [K, D]
        self.register_buffer("bias", bias)  # [K]
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, image: Tensor, text: Tensor, logit_scale: float, logit_bias: float | None = None) -> Tensor:
        rows = self.rows(text)
        return F.linear(F.normalize(image, dim=-1), self.weight[rows], self.bias[rows])


class TipAdapter(FittedClasses):
    """logits = zero-shot + α · exp(-β (1 - f Fᵀ)) L, with the training images' features F [N, D], the keys, and their
    labels, one-hot L [N, K]."""

    def __init__(self, text: Tensor, keys: Tensor, labels: Tensor):
        super().__init__(text)
        self.keys = nn.Parameter(keys.clone())
        self.register_buffer("labels", labels)
        self.labels: Tensor
        self.alpha, self.beta = TIP_ALPHA, TIP_BETA

    def votes(self, image: Tensor) -> Tensor:
        """Of the keys for the fitted classes [B, K], without α."""
        affinity = F.normalize(image, dim=-1) @ self.keys.T  # [B, N]
        weights = torch.exp(-self.beta * (1 - affinity))
        return weights.new_zeros(len(image), len(self.text)).index_add(1, self.labels, weights)

    def forward(self, image: Tensor, text: Tensor, logit_scale: float, logit_bias: float | None = None) -> Tensor:
        zero_shot = Classes(text, logit_scale, logit_bias).zero_shot(image)
        return zero_shot + self.alpha * self.votes(image)[:, self.rows(text)]


class ClipAdapter(nn.Module):
    """logits = zero-shot of 0.2 · A(f) + 0.8 · f, with A(f) = relu(W₂ relu(W₁ f)), W₁ [D/4, D], W₂ [D, D/4]."""

    def __init__(self, embed_dim: int):
        super().__init__()
        width = max(1, embed_dim // CLIP_ADAPTER_REDUCTION)
        self.down = nn.Linear(embed_dim, width, bias=False)
        self.up = nn.Linear(width, embed_dim, bias=False)

    def forward(self, image: Tensor, text: Tensor, logit_scale: float, logit_bias: float | None = None) -> Tensor:
        image = F.normalize(image, dim=-1)
        adapted = self.up(self.down(image).relu()).relu()
        mixed = CLIP_ADAPTER_RATIO * adapted + (1 - CLIP_ADAPTER_RATIO) * image
        return Classes(text, logit_scale, logit_bias).zero_shot(mixed)


def fit_linear_probe(train: Labelled, classes: Classes, *, seed: int, val: Labelled | None = None) -> LinearProbe:
    """Logistic regression, its C chosen on `val` of the powers of ten from 0.1 to 1e5 (the least of the best), or 31.6.

    By torch's L-BFGS: it is the solver that CLIP's probe uses, runs where the features are, and needs no other package.
    """
    features, labels = _prepare(train, classes)
    best, best_accuracy, start = None, -1.0, None
    for c in (PROBE_C,) if val is None else PROBE_CS:
        start = logistic_regression(features, labels, len(classes.text), c, start)
        probe = LinearProbe(classes.text, *start)
        found = 0.0 if val is None else accuracy(predict_labels(val.features, classes, probe), val.labels)
        if found > best_accuracy:
            best, best_accuracy = probe, found
    assert best is not None
    return best


def logistic_regression(
    features: Tensor, labels: Tensor, classes: int, c: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The weight [K, D] and bias [K] at which c · Σ cross-entropy + ‖weight‖² / 2 is least.

    start: of the search; the least is the same from everywhere, as the function is convex. Default: 0.
    """
    if start is None:
        start = features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + weight.square().sum() / (2 * c * len(labels))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return weight.detach(), bias.detach()


def fit_lp_plus_plus(train: Labelled, classes: Classes, *, seed: int, val: Labelled | None = None) -> LinearProbe:
    """LP++: logits = f · (w_k + α_k t_k), cross-entropy over w and the multipliers α by steps that need no choice.

    300 steps of gradient descent with momentum 0.9 on w, by `lp_plus_plus_steps`; every tenth one is on α too. w_k
    starts from the sum of the class's features, all α_k from 250 times the mean similarity of images and their class's
    text, the release's figure. The release adds a random bias to the formula, sums up the gradients of α over all
    steps, and keeps the step that is best on validation images; here none of this is done.
    """
    f, labels = _prepare(train, classes)
    t = F.normalize(classes.text, dim=-1)
    similarity = f @ t.T  # [N, K]
    w_step, alpha_step = lp_plus_plus_steps(f, similarity)
    w = torch.zeros_like(t).index_add_(0, labels, f)
    alpha = LPPP_MULTIPLIER * similarity.gather(1, labels[:, None]).mean().expand(len(t))
    one_hot = F.one_hot(labels, len(t)).to(f.dtype)
    velocity = torch.zeros_like(w)
    for step in range(1, LPPP_STEPS + 1):
        error = ((f @ w.T + alpha * similarity).softmax(-1) - one_hot) / len(f)  # of the logits, [N, K]
        velocity = 0.9 * velocity + error.T @ f
        w = w - w_step * velocity
        if step % 10 == 0:
            alpha = alpha - alpha_step * (error * similarity).sum(0)
    return LinearProbe(classes.text, w + alpha[:, None] * t, w.new_zeros(len(t)))


def lp_plus_plus_steps(f: Tensor, similarity: Tensor) -> tuple[float, float]:
    """The steps on w and α by features [N, D] and similarities [N, K]: 4N / λ(fᵀf), with its largest eigenvalue, and
    N / (4 max_k Σ_i similarity²).

    The inverse of either bounds the second derivative of the mean cross-entropy by one w_k or α_k.
    """
    count = len(f)
    largest = torch.linalg.matrix_norm(f, 2).square()
    return float(4 * count / largest), float(count / (4 * similarity.square().sum(0).max()))


def fit_tip_adapter(train: Labelled, classes: Classes, *, seed: int, val: Labelled | None = None) -> TipAdapter:
    """Tip-Adapter: nothing is trained. α and β are chosen on `val` of 32 x 32 values from 0.1 to 50, else 1 and 5.5."""
    keys, labels = _prepare(train, classes)
    model = TipAdapter(classes.text, keys, labels)
    if val is None:
        return model
    images, truth = _prepare(val, classes)
    zero_shot = classes.zero_shot(images)
    best, best_setting = -1, (TIP_ALPHA, TIP_BETA)
    with torch.no_grad():
        for model.beta in TIP_GRID:
            votes = model.votes(images)
            for alpha in TIP_GRID:
                hits = int(((zero_shot + alpha * votes).argmax(-1) == truth).sum())
                if hits > best:
                    best, best_setting = hits, (alpha, model.beta)
    model.alpha, model.beta = best_setting
    return model


def fit_tip_adapter_f(train: Labelled, classes: Classes, *, seed: int, val: Labelled | None = None) -> TipAdapter:
    """Tip-Adapter-F: Tip-Adapter's keys trained for 20 epochs, under the α and β chosen before."""
    model = fit_tip_adapter(train, classes, seed=seed, val=val)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    _train(model, train, classes, optimizer, epochs=20, batch_size=256, seed=seed)
    return model


def fit_clip_adapter(train: Labelled, classes: Classes, *, seed: int, val: Labelled | None = None) -> ClipAdapter:
    """CLIP-Adapter on the image side with the release's ratio of 0.2.

    50 epochs in batches of 32 by AdamW at 1e-3. The paper's rate of 1e-5 is for CoOp's loop of 200 epochs over crops.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ClipAdapter(classes.text.shape[1]).to(classes.text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    _train(model, train, classes, optimizer, epochs=50, batch_size=32, seed=seed)
    return model


def _train(
    model: nn.Module,
    train: Labelled,
    classes: Classes,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    """Cross-entropy, the rate falling by a cosine to 0 with every step."""
    features, labels = _prepare(train, classes)
    rng = torch.Generator().manual_seed(seed)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(labels) / batch_size))
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=rng).split(batch_size):
            loss = F.cross_entropy(model(features[batch], *classes), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()


def _prepare(items: Labelled, classes: Classes) -> tuple[Tensor, Tensor]:
    """Unit-length features and labels where the classes are, checked."""
    features = F.normalize(items.features.to(classes.text), dim=-1)
    labels = items.labels.to(classes.text.device)
    count = len(classes.text)
    if len(features) != len(labels) or not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= count:
        raise ValueError(
            f"train: got {len(features)} features and {len(labels)} labels"
            + (f" {int(labels.min())}..{int(labels.max())}" if len(labels) else "")
            + f"; it takes as many, at least one, with labels in 0..{count - 1}"
        )
    return features, labels


BASELINES: dict[str, Baseline] = {
    "linear probe": Baseline(fit_linear_probe, False, "Radford et al., ICML 2021, arXiv 2103.00020"),
    "LP++": Baseline(fit_lp_plus_plus, False, "Huang et al., CVPR 2024, arXiv 2404.02285"),
    "Tip-Adapter": Baseline(fit_tip_adapter, False, "Zhang et al., ECCV 2022, arXiv 2207.09519"),
    "Tip-Adapter-F": Baseline(fit_tip_adapter_f, False, "Zhang et al., ECCV 2022, arXiv 2207.09519"),
    "CLIP-Adapter": Baseline(fit_clip_adapter, True, "Gao et al., IJCV 2023, arXiv 2110.04544"),
}
