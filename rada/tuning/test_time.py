"""Test-time training: a head adapts to each image by itself, from views of it and without a label.

An *episode* is one image: its views are encoded once; the tenth of least entropy is kept; the head takes a step down
the entropy of their mean prediction; it then predicts from the plain view, and is reset. Episodes do not depend on one
another, so many run at once, each with its own copy of the parameters that adapt.

Source: Test-Time Prompt Tuning, NeurIPS 2022, arXiv 2209.07511, with the RAda head in the place of the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from rada.checks import check_ints, check_not_negative, check_positive
from rada.classification import Classes
from rada.fused import RAdaHead
from rada_kernels import QUERIES, rada_attended_rows
from rada_kernels.checks import LAYERS
from rada_kernels.numerics import accumulation_dtype, unit_rows

MIB = 1 << 20
# Of the episodes that run at once. More of them are no faster on a CPU, whose caches they leave.
EPISODE_BYTES = {"cpu": 64 * MIB}
EPISODE_BYTES_ELSEWHERE = 1024 * MIB
OUTPUT_LAYER = "out_proj"


@dataclass(frozen=True)
class Adaptation:
    """The settings of test-time training; the defaults are TPT's.

    steps: optimizer steps per image, at least 1. Default 1.
    lr: learning rate of AdamW. Default 5e-3.
    weight_decay: AdamW's. Default 0.01.
    selection: share of the views that is kept, those of least entropy: int(selection · V) of V, at least one.
        Default 0.1.
    parameters: names of the head's layers ("out_proj") or tensors ("out_proj.bias") that adapt.
        Default: the output layer, the one that starts at zero.
    online: carry parameters and optimizer on from image to image instead of resetting them. Default False.
    """

    steps: int = 1
    lr: float = 5e-3
    weight_decay: float = 0.01
    selection: float = 0.1
    parameters: tuple[str, ...] = (OUTPUT_LAYER,)
    online: bool = False

    def __post_init__(self):
        check_ints(1, steps=self.steps)
        check_positive(lr=self.lr)
        check_not_negative(weight_decay=self.weight_decay)
        if not 0 < self.selection <= 1:
            raise ValueError(f"selection: got {self.selection!r}; it takes a share above 0 and up to 1")
        if isinstance(self.parameters, str) or not self.parameters:
            raise ValueError(f"parameters: got {self.parameters!r}; it takes a tuple of at least one name")

    def kept(self, views: int) -> int:
        """How many of V views are kept."""
        return max(1, int(self.selection * views))


class Adapted(NamedTuple):
    """N images after their episodes."""

    logits: Tensor  # [N, K] of the plain view by the adapted head
    zero_shot: Tensor  # [N, K] of the plain view without a head
    kept: Tensor  # [N, V'] int64, the kept views, least entropy first


class TestTimeAdapter:
    """Adapts a head to images, each by itself or one after the other.

        adapter = TestTimeAdapter(head, Classes(text_features, logit_scale))
        logits = adapter(views).logits  # views: features [N, V, D], the plain view first

    head: the RAdaHead to start from, trained or not. Its own parameters and gradients stay as they are.
    classes: text features [K, D], logit scale and bias, on the head's device and in its dtype.
    adaptation: the settings.
    episode_bytes: what the episodes that run at once may take, one at least. Default 64 MiB on CPUs, else 1 GiB.

    Where the output layer alone adapts, episodes run in parallel: the attended rows before it do not depend on it and
    are computed once, by the head's backend, and a step is one batched product over the copies [N, D, D]. Other
    layers, and `online`, take one episode after another. Until the output layer differs from zero, logits are
    the zero-shot ones and the views are selected without attention.

    Copies, their gradients and AdamW are in float32 (float64 for a float64 head). An episode's parameters and optimizer
    start afresh, so the reset is exact. NaN in one image's views stays in that image's logits. Entropies are those of
    the softmax over the classes, for SigLIP too.

    Raises ValueError for a name that the head lacks, or a layer of a query kind that is not in use.
    """

    def __init__(
        self,
        head: RAdaHead,
        classes: Classes,
        adaptation: Adaptation | None = None,
        *,
        episode_bytes: int | None = None,
    ):
        self.head, self.classes = head, classes
        self.adaptation = Adaptation() if adaptation is None else adaptation
        self.names = _parameter_names(head, self.adaptation.parameters)
        self.output_layer_alone = all(name.startswith(f"{OUTPUT_LAYER}.") for name in self.names)
        device = classes.text.device
        if episode_bytes is None:
            episode_bytes = EPISODE_BYTES.get(device.type, EPISODE_BYTES_ELSEWHERE)
        self.episode_bytes = episode_bytes
        self._text = self._units(classes.text)
        self._online: _Copies | None = None

    def __call__(self, views: Tensor) -> Adapted:
        """The episodes of N images, from features [N, V, D] of their views, the plain one first.

        The features have the head's dtype and device. Logits [N, K] are float32, or float64.
        Views of NaN are kept last. Raises TypeError or ValueError naming what is wrong with `views`.
        """
        self._check(views)
        if not len(views):
            none = self._text.new_empty(0, len(self._text))
            return Adapted(none, none, torch.empty(0, self.adaptation.kept(views.shape[1]), dtype=torch.int64))
        with torch.no_grad():
            chunks = [self._adapt(chunk) for chunk in views.split(self._episodes_at_once(views.shape[1]))]
        return Adapted._make(map(torch.cat, zip(*chunks, strict=True)))

    def reset(self) -> None:
        """Forget what `online` carried on."""
        self._online = None

    def _check(self, views: Tensor) -> None:
        width, weight = self.head.embed_dim, self.head.k_proj.weight
        if not isinstance(views, Tensor):
            raise TypeError(f"views: got {type(views).__name__}; it takes features [N, V, {width}]")
        if views.dim() != 3 or views.shape[2] != width or views.shape[1] < 1:
            raise ValueError(f"views: got shape {list(views.shape)}; it takes [N, V, {width}] with V at least 1")
        if views.dtype != weight.dtype or views.device != weight.device:
            raise TypeError(
                f"views: got {views.dtype} on {views.device}; it takes {weight.dtype} on {weight.device}, as the head"
            )

    def _episodes_at_once(self, views: int) -> int:
        if self.adaptation.online or not self.output_layer_alone:
            return 1
        width, images = self.head.embed_dim, 1 + self.adaptation.kept(views)
        # A copy with its gradient, AdamW's two moments and what its step makes; the attended rows, the output layer's
        # result and their gradients.
        numbers = 6 * width * (width + 1) + 5 * images * len(self._text) * width
        return max(1, self.episode_bytes // (numbers * self._text.dtype.itemsize))

    def _adapt(self, views: Tensor) -> Adapted:  # [n, V, D]
        copies = self._online or _Copies(self.head, self.names, len(views), self.adaptation)
        if self.adaptation.online:
            self._online = copies
        zero_shot = self._to_logits(self._units(views) @ self._text.T)  # [n, V, K]
        kept = self._select(zero_shot if copies.mask_is_one() else self._head_logits(views, copies))
        images = torch.cat([views[:, :1], views.gather(1, kept.unsqueeze(-1).expand(-1, -1, views.shape[2]))], 1)
        if self.output_layer_alone:
            f, attended = self._units(images), self._attended_rows(images)

            def logits(v: slice) -> Tensor:  # of the plain view and the kept ones, those of the slice
                weight, bias = (copies.get(f"{OUTPUT_LAYER}.{name}") for name in ("weight", "bias"))
                return self._to_logits(masked_sums(attended[:, v], weight, bias, f[:, v], self._text))

        else:

            def logits(v: slice) -> Tensor:
                return self._head_logits(images[:, v], copies)

        for _ in range(self.adaptation.steps):
            with torch.enable_grad():
                copies.step(mean_prediction_entropy(logits(slice(1, None))).sum())
        return Adapted(logits(slice(1)).squeeze(1), zero_shot[:, 0], kept)

    def _select(self, logits: Tensor) -> Tensor:  # [n, V, K] -> [n, V']
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        return entropy.argsort(dim=-1, stable=True)[:, : self.adaptation.kept(logits.shape[1])]

    def _head_logits(self, views: Tensor, copies: _Copies) -> Tensor:
        """[n, v, K] of features [n, v, D] by the whole head with the first copy, which n > 1 still agree with."""
        parameters = {name: tensor[0].to(views.dtype) for name, tensor in copies.tensors.items()}
        logits = functional_call(self.head, parameters, (views.flatten(0, 1), *self.classes))
        return logits.to(self._text.dtype).unflatten(0, views.shape[:2])

    def _attended_rows(self, views: Tensor) -> Tensor:
        """[n, v, K, D] of features [n, v, D], in the accumulation dtype."""
        head, images = self.head, views.flatten(0, 1)
        params = head.params(self.classes.logit_scale)
        rows = rada_attended_rows(images, self.classes.text, params, head.options, head.backend)
        return rows.to(self._text.dtype).unflatten(0, views.shape[:2])

    def _units(self, rows: Tensor) -> Tensor:
        """Feature rows as the head takes them, in the accumulation dtype."""
        rows = rows.to(accumulation_dtype(rows.dtype))
        return unit_rows(rows) if self.head.options.normalize else rows

    def _to_logits(self, sums: Tensor) -> Tensor:
        logits = self.classes.logit_scale * sums
        return logits if self.classes.logit_bias is None else logits + self.classes.logit_bias


class _Copies:
    """n copies of the parameters that adapt, and the optimizer of all of them. AdamW acts on each number by itself."""

    def __init__(self, head: RAdaHead, names: tuple[str, ...], n: int, adaptation: Adaptation):
        self.head, self.n = head, n
        self.tensors = {
            name: self._repeat(head.get_parameter(name)).clone().requires_grad_() for name in names
        }  # [n, ...] by name
        self.optimizer = torch.optim.AdamW(
            self.tensors.values(), lr=adaptation.lr, weight_decay=adaptation.weight_decay
        )

    def get(self, name: str) -> Tensor:
        """[n, ...] of a parameter: the copies where it adapts, else n times the head's own."""
        return self.tensors[name] if name in self.tensors else self._repeat(self.head.get_parameter(name))

    def mask_is_one(self) -> bool:
        """Whether the output layer is zero, and so every logit the zero-shot one."""
        return not any(self.get(f"{OUTPUT_LAYER}.{name}").any() for name in ("weight", "bias"))

    def step(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, list(self.tensors.values()))  # none reaches the head's own parameters
        for tensor, gradient in zip(self.tensors.values(), gradients, strict=True):
            tensor.grad = gradient
        self.optimizer.step()

    def _repeat(self, parameter: Tensor) -> Tensor:
        parameter = parameter.detach().to(accumulation_dtype(parameter.dtype))
        return parameter.expand(self.n, *parameter.shape)


def masked_sums(attended: Tensor, weight: Tensor, bias: Tensor, f: Tensor, h: Tensor) -> Tensor:
    """Σ_d M f h [n, v, K], M = relu(1 + O Woᵀ + co), with an output layer for each of n episodes.

    attended: O [n, v, K, D]. weight [n, D, D], bias [n, D]. f [n, v, D], h [K, D]: unit features.
    """
    out = torch.baddbmm(bias.unsqueeze(1), attended.flatten(1, 2), weight.mT)  # [n, v·K, D]
    mask = out.add_(1).relu_().unflatten(1, attended.shape[1:3])
    return ((mask * h) @ f.unsqueeze(-1)).squeeze(-1)


def mean_prediction_entropy(logits: Tensor) -> Tensor:
    """The entropy [n] of the mean over v of softmax(logits) [n, v, K], formed in log space."""
    mean = logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])  # [n, K] logarithms
    return -(mean.exp() * mean).sum(-1)


def _parameter_names(head: RAdaHead, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the head's tensors that are wanted, by layer or by tensor, in the head's order."""
    idle = {LAYERS[f"query_{kind}"] for kind in QUERIES if kind not in head.options.queries}
    usable = [name for name, _ in head.named_parameters() if name.partition(".")[0] not in idle]
    layers = list(dict.fromkeys(name.partition(".")[0] for name in usable))
    unknown = [name for name in wanted if name not in (*layers, *usable)]
    if unknown:
        raise ValueError(f"parameters: got {unknown[0]!r}; it takes names of {layers}, or of their .weight and .bias")
    return tuple(name for name in usable if name in wanted or name.partition(".")[0] in wanted)
