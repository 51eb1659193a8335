"""RAdaHead: the head as a module."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rada import sharded
from rada.checks import check_ints, check_one_of
from rada.released import NUM_HEADS, head_state, read_checkpoint
from rada_kernels import BackendChoice, Options, Params, backend_for, rada_logits, rada_mask
from rada_kernels.dispatch import BACKENDS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RAdaHead(nn.Module):
    """The RAda head: logits of image features against text features under a learned mask of the rational matrix.

    The same as ``logit_scale * f @ h.T`` until it is trained (f, h: features divided by their norms), because the
    output projection starts at zero.

    embed_dim: D, the width of both features.
    num_heads: H, must divide embed_dim. Default 8.
    temperature: τ, divides the attention scores. Default 1.0.
    queries: any non-empty subset of ("image", "text", "rational"). Default: all three.
    penalty: "linf" (default), "l1" or "mse": the measure of |M - 1| that is penalised.
    normalize: divide the features by their L2 norm first. Default True; a zero row stays zero, with zero gradient.
    backend: "auto" (default, or what RADA_BACKEND names), "torch", "reference", ...: see `rada_kernels.BACKENDS`.
    device, dtype: of the parameters. Features must have the same; under torch.autocast, any floating dtype but float64.

    Parameters carry the released names: q_proj1, q_proj2, q_proj3 (image, text, rational query), k_proj, v_proj,
    out_proj, each with weight [D, D] and bias [D]. These are read, and the layers never called: hooks on them do not
    run, parametrizations do. Layers of unused query kinds do not require a gradient, so that DistributedDataParallel
    finds none unused.

    Source: One Last Attention for Your Vision-Language Model, ICCV 2025, arXiv 2507.15480.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        *,
        temperature: float = 1.0,
        queries: tuple[str, ...] = ("image", "text", "rational"),
        penalty: str = "linf",
        normalize: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_ints(1, embed_dim=embed_dim)
        self.options = Options(num_heads, temperature, tuple(queries) if isinstance(queries, list) else queries,
                               penalty, normalize)  # fmt: skip
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}; it takes a divisor of embed_dim {embed_dim}")
        check_one_of(("auto", *BACKENDS), backend=backend)
        self.embed_dim = embed_dim
        self.backend = backend
        self._process_group: ProcessGroup | None = None

        def linear():
            return nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)

        self.q_proj1, self.q_proj2, self.q_proj3 = linear(), linear(), linear()
        self.k_proj, self.v_proj, self.out_proj = linear(), linear(), linear()
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        for kind, layer in (("image", self.q_proj1), ("text", self.q_proj2), ("rational", self.q_proj3)):
            layer.requires_grad_(kind in self.options.queries)

    @classmethod
    def from_released(
        cls,
        checkpoint: str | os.PathLike | Mapping,
        num_heads: int | None = None,
        *,
        temperature: float | None = None,
        **options: Any,
    ) -> RAdaHead:
        """A head from a checkpoint of the released training code, {"state_dict": {"mha.q_proj1.weight": ...}}.

        checkpoint: its path, such as model.pth.tar-5, or the loaded dict; or a bare state dict, with or without the
            "mha." prefix. Nothing in a file is run.
        num_heads, temperature: those of the run, which no checkpoint holds. Default: 8, written into the released code,
            and 1.0, which its runs set by experiment (TEMP); a UserWarning says what was assumed.
        options: as for RAdaHead. dtype defaults to the checkpoint's.

        Raises FileNotFoundError, or ValueError for a file that cannot be read this way and for one without a head.
        """
        state = head_state(checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint))
        assumed = []
        if num_heads is None:
            num_heads = NUM_HEADS
            assumed.append(f"num_heads={num_heads}")
        if temperature is None:
            temperature = 1.0
            assumed.append(f"temperature={temperature}")
        if assumed:
            warnings.warn(
                f"from_released: assumed {', '.join(assumed)}, which a checkpoint does not hold; give those of its run "
                "to from_released",
                stacklevel=2,
            )
        weight = state["q_proj1.weight"]
        options.setdefault("dtype", weight.dtype)
        head = cls(weight.shape[0], num_heads, temperature=temperature, **options)
        head.load_state_dict(state)
        return head

    def params(self, logit_scale: Tensor | float = 1.0, logit_bias: Tensor | float | None = None) -> Params:
        """The head's tensors as `rada_kernels.rada_logits` takes them.

        Raises TypeError for a layer that something else than a linear one has replaced, such as an adapter's wrapper.
        """
        layers = (self.q_proj1, self.q_proj2, self.q_proj3, self.k_proj, self.v_proj, self.out_proj)
        for layer in layers:
            if not isinstance(layer, nn.Linear):  # its weight alone would be read, and the rest of it left out
                name = next(name for name, child in self.named_children() if child is layer)
                raise TypeError(f"{name}: got {type(layer).__name__}; it takes an nn.Linear")
        tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        return Params._make((*tensors, logit_scale, logit_bias))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        return_penalty: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, K] of image_features [B, D] against text_features [K, D].

        logit_scale: the exponentiated scale, a float or a 0-d tensor; open_clip: ``model.logit_scale.exp()``.
        logit_bias: SigLIP's, or None.
        return_penalty: also return the penalty, a 0-d float32 tensor; add α times it to the loss.

        Logits have the features' dtype, float32 under autocast. Raises TypeError or ValueError naming the argument.
        """
        call = image_features, text_features, self.params(logit_scale, logit_bias), self.options
        group = self._process_group
        logits, penalty = rada_logits(*call, self.backend) if group is None else sharded.sharded_logits(*call, group)
        return (logits, penalty) if return_penalty else logits

    @property
    def shares_classes(self) -> bool:
        """Whether it is what `shard_classes` returned."""
        return self._process_group is not None

    def shard_classes(self, process_group: ProcessGroup | None = None) -> RAdaHead:
        """This head as all processes of a group compute it together, each for its share of the classes.

        For very many classes: of a call's rows [B, K, D] a process holds its own K / P, in forward and backward, and
        does 1 / P of the work on K², in plain PyTorch, on any device. Results are the unsharded head's: the attention
        stays joint over all K·K pairs. docs/many-classes.md has the cost.

        process_group: of torch.distributed; every process calls. Default: the default group.

        Returns a head with the same parameters, and leaves this one as it is. Its arguments are the same in every
        process, the whole batch and all K classes, K at least the number of processes; so are its logits [B, K],
        penalty and gradients, all of them whole, where every process takes the same loss of the logits. An optimizer
        may step at once. DistributedDataParallel is for further processes, that have other images and a group of their
        own.

        Raises ValueError for a backend other than "auto" and "torch", without such a group, and, in every process, for
        a call with a wrong argument in one of them or with other arguments than rank 0's.
        """
        if self.backend not in ("auto", "torch"):
            raise ValueError(f"backend: got {self.backend!r}; sharded classes take 'auto' or 'torch'")
        head = copy.copy(self)
        head._process_group = sharded.check_group(process_group)
        return head

    def mask(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
        """The mask M [B, K, D], without gradients. It is as large as it looks: for a few images at a time."""
        return rada_mask(image_features, text_features, self.params(logit_scale), self.options)

    def backend_for(self, image_features: Tensor) -> BackendChoice:
        """The name of the backend that serves these features; `.passed_over` says why not the ones before it."""
        return backend_for(image_features, self.options, self.backend)

    def extra_repr(self) -> str:
        o = self.options
        return (
            f"{self.embed_dim}, num_heads={o.num_heads}, temperature={o.temperature}, queries={o.queries}, "
            f"penalty={o.penalty!r}, normalize={o.normalize}, backend={self.backend!r}"
        )
