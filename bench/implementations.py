"""The methods that are measured against each other, and the work each of them does."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sdpa import sdpa_logits
from torch import Tensor
from workloads import Inputs, Workload

from rada_kernels import BACKENDS, rada_logits, usable_backends

# Every process that compiles would warn of a CUDA toolkit without a device.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

PENALTY_WEIGHT = 0.1  # α of the training objective
COMPILED = "-compiled"
ENCODER = "ViT-B-32"  # what the head's time is held against end to end
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Method:
    """A way to compute the head: head(image, text, params, options) -> (logits [B, K], penalty [])."""

    name: str
    head: Callable
    compiled: bool = False


def all_methods() -> dict[str, Method]:
    """Every method by name: the baselines, eager and compiled, and each backend of rada_kernels."""
    heads = {"reference": functools.partial(rada_logits, backend="reference"), "sdpa": sdpa_logits}
    methods = [
        method
        for name, head in heads.items()
        for method in (Method(name, head), Method(name + COMPILED, head, compiled=True))
    ]
    backends = [name for name in BACKENDS if name != "reference"]
    methods += [Method(name, functools.partial(rada_logits, backend=name)) for name in backends]
    return {method.name: method for method in methods}


def choose_methods(names: list[str] | None) -> list[Method]:
    """The methods of those names, or all. Raises ValueError for a name that does not exist, with those that
    do.
    """
    methods = all_methods()
    for name in names or []:
        if name not in methods:
            raise ValueError(f"backend: got {name!r}; it takes one of {', '.join(methods)}")
    return [method for name, method in methods.items() if names is None or name in names]


def why_unusable(method: Method, load: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why a method cannot serve a workload, or None where it can."""
    backends = usable_backends(dtype, device, load.width, load.heads)
    if method.name in backends:
        usable, reason = backends[method.name]
        return None if usable else reason
    if method.head is sdpa_logits and dtype == torch.float64 and device.type != "cpu":
        return "flex_attention takes no float64"
    return None


def work(method: Method, inputs: Inputs) -> Callable[[], list[Tensor]]:
    """What is timed: a call that does a method's work on these inputs and returns its results, see
    result_names.

    forward: logits and penalty without gradients. Steps: also the gradients of cross-entropy + α·penalty.
    """

    def objective(image, text, layers, labels):
        params = inputs.params._replace(**dict(zip(inputs.params._fields, layers, strict=False)))
        logits, penalty = method.head(image, text, params, inputs.options)
        # The mean over the batch and the penalty in float32, as losses are computed under autocast.
        numbers = logits if logits.dtype == torch.float64 else logits.float()
        return logits, penalty, F.cross_entropy(numbers, labels) + PENALTY_WEIGHT * penalty

    def head_only(image, text, layers):
        params = inputs.params._replace(**dict(zip(inputs.params._fields, layers, strict=False)))
        return method.head(image, text, params, inputs.options)

    if method.compiled:
        # Shapes are known: static code is the faster, and a graph break would be a fault worth seeing.
        objective = torch.compile(objective, dynamic=False, fullgraph=True)
        head_only = torch.compile(head_only, dynamic=False, fullgraph=True)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return list(head_only(inputs.image, inputs.text, inputs.params.layers))

    def step() -> list[Tensor]:
        logits, penalty, loss = objective(inputs.image, inputs.text, inputs.params.layers, inputs.labels)
        return [logits.detach(), penalty.detach(), *torch.autograd.grad(loss, inputs.differentiated)]

    return forward if inputs.mode == "forward" else step


def result_names(inputs: Inputs) -> list[str]:
    """The names of what `work` returns, in its order."""
    names = [f"gradient of {name}" for name in (*inputs.params._fields[:12], "image", "text")]
    return ["logits", "penalty", *names[: len(inputs.differentiated)]]


def make_encoder(batch: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A call that encodes a batch of random images with open_clip's ViT-B/32, random weights: real shapes.

    Raises ImportError without open_clip.
    """
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip.get_model_config(ENCODER)).to(device, dtype).eval()
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device, dtype=dtype)
    return torch.no_grad()(lambda: model.encode_image(images))
