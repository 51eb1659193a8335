"""Learned prompts: CoOp's context in the text tower, and its deep variant, IVLP, in both towers.

    prompt = PromptLearner(model, tokenizer)  # an open_clip model, or a HuggingFaceEncoder
    encoder = PromptedEncoder(model, prompt)  # encode_image, encode_text: the model's, with the prompt in them
    tuned = PromptedHead(encoder, head, class_names)  # called as the head, on images in place of their features
    averaged = AveragedModel(tuned.trained, avg_fn=gaussian_average())  # of torch.optim.swa_utils

A trainer updates `averaged` after each epoch; at the end `tuned.trained` loads the state of `averaged.module`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rada.checks import check_ints
from rada.classification import Classes
from rada.encoders import FeatureExtractor
from rada.losses import PromptSRC, Views

CONTEXT = "a photo of a"
# IVLP's; a shallower tower is prompted in all of its layers.
DEPTH = 9
# Of tokens that start from no word, as in CoOp and VPT.
INIT_STD = 0.02


class Tower(NamedTuple):
    """Where a tower takes tokens."""

    embedding: Any  # a module; its output is what enters the first block, bar position and norm: [N, L, width]
    blocks: Any  # ModuleList or Sequential; each takes [N, L, width], or [L, N, width] without batch_first
    width: int
    batch_first: bool = True


class PromptLearner(nn.Module):
    """The tokens of a prompt, learned: text_context [depth, n, width] and image_context [depth, n, width].

    model: an open_clip CLIP, CustomTextCLIP (SigLIP) or CoCa with transformer towers, or a HuggingFaceEncoder.
    tokenizer: the model's, strings -> token ids [N, L].
    context: the words before a class name. Default "a photo of a".
    text_tokens: n of the text tower, 1 to the tokens of context. Default 2. The first n tokens of context are learned,
        from their own embeddings; those after them stay words.
    image_tokens: n of the image tower, behind its patches. Default 2; 0 leaves the image tower as it is.
    depth: layers with tokens of their own, from the first; 1 is CoOp's. A deeper layer takes its tokens in place of
        what the layer before made of its own. Default: 9, or the layers of the shallower tower.

    All but the context's embeddings start normal with standard deviation 0.02. Parameters are float32 (float64 for a
    float64 model), on the model's device.

    Sources: CoOp, arXiv 2109.01134; IVLP as in PromptSRC, arXiv 2307.06948.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Callable,
        *,
        context: str = CONTEXT,
        text_tokens: int = 2,
        image_tokens: int = 2,
        depth: int | None = None,
    ):
        super().__init__()
        self.context, self.tokenizer = context, tokenizer
        towers = [text_tower(model), *([image_tower(model)] if image_tokens else [])]
        layers = min(len(tower.blocks) for tower in towers)
        depth = min(DEPTH, layers) if depth is None else depth
        if not 1 <= depth <= layers:
            raise ValueError(f"depth: got {depth}; it takes 1..{layers}, the layers of the shallower tower")
        check_ints(0, image_tokens=image_tokens)
        empty, alone, twice = tokenizer(["", context, f"{context} {context}"])
        self.start = _first_difference(empty, alone)  # behind the start token, where there is one
        words = _first_difference(alone, twice) - self.start
        if words < 1:
            raise ValueError(f"context: got {context!r}; it takes words that the tokenizer puts at the start of a text")
        if not 1 <= text_tokens <= words:
            raise ValueError(f"text_tokens: got {text_tokens}; it takes 1..{words}, the tokens of {context!r}")
        self.register_buffer("_ids", alone[self.start : self.start + text_tokens], persistent=False)
        self._ids: Tensor

        embedding = towers[0].embedding.weight.detach()  # [vocabulary, width]
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        contexts = [
            nn.Parameter(INIT_STD * torch.randn(depth, count, tower.width, dtype=dtype))
            for count, tower in zip((text_tokens, image_tokens), towers, strict=False)
        ]
        self.text_context = contexts[0]
        self.image_context = contexts[1] if image_tokens else None
        with torch.no_grad():
            self.text_context[0] = embedding[self._ids.to(embedding.device)].cpu()
        self.to(embedding.device)

    def tokenize(self, class_names: Sequence[str]) -> Tensor:
        """Token ids [K, L] of "<context> <class name>."; underscores of a name become spaces."""
        return self.tokenizer([f"{self.context} {name.replace('_', ' ')}." for name in class_names])

    @contextmanager
    def in_text(self, model: Any, tokens: Tensor) -> Iterator[None]:
        """The text tower takes the learned context while this is open; tokens [N, L] are what it will encode.

        Raises ValueError for tokens that do not begin with the context.
        """
        count = len(self._ids)
        span = slice(self.start, self.start + count)
        if not (tokens[:, span] == self._ids.to(tokens.device)).all():
            raise ValueError(f"tokens: got a text without {self.context!r} at its start; it takes texts that begin so")

        def put(x, context):  # [N, L, width], [n, width]
            return _splice(x[:, : span.start], context, x[:, span.stop :])

        with _prompted(text_tower(model), self.text_context, put, put):
            yield

    @contextmanager
    def in_image(self, model: Any) -> Iterator[None]:
        """The image tower takes the learned tokens while this is open."""
        if self.image_context is None:
            yield
            return
        count = self.image_context.shape[1]

        def append(x, context):  # [N, L, width], [n, width] -> [N, L + n, width]
            return _splice(x, context, x[:, :0])

        with _prompted(
            image_tower(model), self.image_context, append, lambda x, context: append(x[:, :-count], context)
        ):
            yield

    @property
    def options(self) -> dict[str, Any]:
        """What a prompt of these sizes is made with, beside model and tokenizer; a checkpoint keeps it."""
        depth, text_tokens, _ = self.text_context.shape
        image_tokens = 0 if self.image_context is None else self.image_context.shape[1]
        return {"context": self.context, "text_tokens": text_tokens, "image_tokens": image_tokens, "depth": depth}


class PromptedEncoder(nn.Module):
    """A frozen model under a prompt, with the model's own interface: encode_image, encode_text, scale and bias.

    model: as for PromptLearner; its parameters no longer require a gradient, and it stays in eval mode.
    prompt: the PromptLearner made for it.
    """

    def __init__(self, model: Any, prompt: PromptLearner):
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.prompt = prompt

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features [B, D], not normalized, of preprocessed images [B, 3, H, W]."""
        with self.prompt.in_image(self.model):
            return self.model.encode_image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features [N, D], not normalized, of token ids [N, L] that begin with the context."""
        with self.prompt.in_text(self.model, tokens):
            return self.model.encode_text(tokens)

    @property
    def visual(self) -> nn.Module:
        """The model's image tower."""
        return self.model.visual

    @property
    def logit_scale(self) -> Tensor:
        """The scale's logarithm, as the model stores it."""
        return self.model.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """SigLIP's bias, or None."""
        return getattr(self.model, "logit_bias", None)

    def train(self, mode: bool = True) -> PromptedEncoder:
        """Set the training mode; the frozen model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self


class PromptedExtractor(FeatureExtractor):
    """Encoders under a learned prompt, for use after training: class features are `PromptedHead.class_features`.

    encoders: the frozen ones. prompt: the PromptLearner made for their model; it no longer requires a gradient.
    """

    def __init__(self, encoders: FeatureExtractor, prompt: PromptLearner):
        self._like(encoders, PromptedEncoder(encoders.model, prompt.requires_grad_(False)))
        self.frozen = encoders

    def classes(self, class_names: Sequence[str]) -> Classes:
        """The classes of these names: half prompted, half as the frozen encoders have them."""
        frozen = self.frozen.classes(class_names)
        tuned = PromptedHead(self.model, nn.Identity(), class_names)
        with torch.no_grad():
            return frozen._replace(text=tuned.class_features(frozen.text))


class PromptedHead(nn.Module):
    """A head under a prompt, called as the head itself is, on images in place of their features.

    encoder: the PromptedEncoder. head: a RAdaHead with normalize=True, or an AdaptedHead.
    class_names: K names, in the order of the text features of a call; `set_classes` changes them.
    regularizer: what a call with return_penalty returns after the head's penalty, such as `PromptSRC()`. Default None.

    The class features are ½ (prompted + frozen), both of unit length, divided by their norm. (The released code takes
    the mean of features that are not normalized.) After training `class_features` gives them, once for all images, and
    `head` is called with them.
    """

    def __init__(
        self,
        encoder: PromptedEncoder,
        head: nn.Module,
        class_names: Sequence[str],
        *,
        regularizer: PromptSRC | None = None,
    ):
        super().__init__()
        self.encoder, self.head, self.regularizer = encoder, head, regularizer
        self.register_buffer("_tokens", None, persistent=False)
        self._tokens: Tensor
        self.set_classes(class_names)

    def set_classes(self, class_names: Sequence[str]) -> None:
        """Change the classes."""
        self._tokens = self.encoder.prompt.tokenize(class_names).to(self.encoder.logit_scale.device)

    @property
    def trained(self) -> nn.ModuleDict:
        """What training changes, and a checkpoint holds: prompt and head."""
        return nn.ModuleDict({"prompt": self.encoder.prompt, "head": self.head})

    def class_features(self, text_features: Tensor) -> Tensor:
        """Unit-length class features [K, D] under the prompt, of the frozen tower's text_features [K, D]."""
        return self._texts(text_features)[2]

    def forward(
        self,
        images: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        return_penalty: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits [B, K], or (logits, penalty), or with a regularizer (logits, penalty, its value).

        images: preprocessed images [B, 3, H, W], in the dtype that the image tower takes; or image features [B, D],
            where the prompt has no image tokens.
        text_features: the frozen tower's [K, D], averaged over templates.
        logit_scale, logit_bias: as for RAdaHead.
        """
        prompted_text, frozen_text, text = self._texts(text_features)
        image = self._features(images, self.encoder, text_features.dtype)
        outputs = self.head(image, text, logit_scale, logit_bias, return_penalty=return_penalty)
        if not return_penalty or self.regularizer is None:
            return outputs
        logits, penalty = outputs
        with torch.no_grad():
            frozen_image = self._features(images, self.encoder.model, text_features.dtype)
            frozen_logits = logit_scale * frozen_image @ frozen_text.T
            if logit_bias is not None:
                frozen_logits = frozen_logits + logit_bias
        value = self.regularizer(Views(image, prompted_text, logits), Views(frozen_image, frozen_text, frozen_logits))
        return logits, penalty, value

    def _texts(self, text_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-length text features [K, D]: prompted, frozen, and the classes' ones, half of each."""
        if len(text_features) != len(self._tokens):
            raise ValueError(
                f"text_features: got those of {len(text_features)} classes; it takes those of the "
                f"{len(self._tokens)} classes of set_classes"
            )
        prompted = F.normalize(self.encoder.encode_text(self._tokens).to(text_features.dtype), dim=-1)
        frozen = F.normalize(text_features, dim=-1)
        return prompted, frozen, F.normalize(prompted + frozen, dim=-1)

    def _features(self, images: Tensor, encoder: Any, dtype: torch.dtype) -> Tensor:
        if images.dim() == 4:
            return F.normalize(encoder.encode_image(images).to(dtype), dim=-1)
        if self.encoder.prompt.image_context is not None:
            raise ValueError(
                f"images: got {list(images.shape)}; it takes images [B, 3, H, W], as the prompt has image tokens"
            )
        return F.normalize(images, dim=-1)


def gaussian_average(epochs: int = 20, mean: float = 15.0, std: float = 1.0) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """PromptSRC's average over epochs, as `avg_fn` of `torch.optim.swa_utils.AveragedModel`.

    Epoch e = 1, 2, ... has the weight exp(-½ ((e - mean) / std)²); the average is over the epochs so far.
    epochs: how many there will be. Defaults: 15 and 1 of 20 epochs.
    """
    if not std > 0 or not math.isfinite(mean):
        raise ValueError(f"mean, std: got {mean}, {std}; it takes finite numbers, std positive")
    # Divided by the largest, so that none but negligible weights underflow.
    exponents = [-(((epoch - mean) / std) ** 2) / 2 for epoch in range(1, epochs + 1)]
    weights = [math.exp(exponent - max(exponents)) for exponent in exponents]

    def average(averaged: Tensor, current: Tensor, done: Any) -> Tensor:
        total = sum(weights[: int(done) + 1])
        return averaged + (current - averaged) * (weights[int(done)] / total if total else 1.0)

    return average


def text_tower(model: Any) -> Tower:
    """The text tower of open_clip's models and of a HuggingFaceEncoder."""
    tower = getattr(model, "text", model)  # CLIP holds the parts of its text tower itself
    transformer: Any = getattr(tower, "transformer", None)
    if hasattr(transformer, "resblocks"):
        return Tower(tower.token_embedding, transformer.resblocks, transformer.width, transformer.batch_first)
    if hasattr(transformer, "encoder"):
        return _transformers_tower(transformer, transformer.get_input_embeddings())
    raise ValueError(f"model: got the text tower {type(tower).__name__}; it takes a transformer's, to put tokens in")


def image_tower(model: Any) -> Tower:
    """The image tower of the same models."""
    visual = model.visual
    transformer: Any = getattr(visual, "transformer", None)
    if hasattr(transformer, "resblocks"):
        return Tower(visual.patch_dropout, transformer.resblocks, transformer.width, transformer.batch_first)
    if hasattr(transformer, "encoder"):
        return _transformers_tower(transformer, transformer.embeddings)
    trunk: Any = getattr(visual, "trunk", visual)
    if hasattr(trunk, "patch_drop") and getattr(trunk, "rope", None) is None:  # timm's VisionTransformer
        return Tower(trunk.patch_drop, trunk.blocks, trunk.embed_dim)
    raise ValueError(f"image_tokens: got the image tower {type(trunk).__name__}, which takes no tokens; it takes 0")


def _transformers_tower(transformer: Any, embedding: nn.Module) -> Tower:
    blocks = next(blocks for name, blocks in transformer.encoder.named_children() if name in ("layers", "layer"))
    return Tower(embedding, blocks, transformer.config.hidden_size)


class _PromptedBlock(nn.Module):
    """A block behind what puts its tokens in. A module of its own, so that gradient checkpointing repeats that too."""

    def __init__(self, block: nn.Module, put: Callable):
        super().__init__()
        self.block, self.put = block, put

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.block(self.put(x), *args, **kwargs)


@contextmanager
def _prompted(tower: Tower, contexts: Tensor, first: Callable, deeper: Callable) -> Iterator[None]:
    """While open, the first of contexts [depth, n, width] enters the embedding's output, the others their blocks."""

    def put_deeper(context):
        if tower.batch_first:
            return lambda x: deeper(x, context)
        return lambda x: deeper(x.transpose(0, 1), context).transpose(0, 1)

    blocks = list(tower.blocks)
    with ExitStack() as stack:
        stack.enter_context(tower.embedding.register_forward_hook(lambda module, args, x: first(x, contexts[0])))
        for layer in range(1, len(contexts)):
            tower.blocks[layer] = _PromptedBlock(blocks[layer], put_deeper(contexts[layer]))
            stack.callback(tower.blocks.__setitem__, layer, blocks[layer])
        yield


def _splice(before: Tensor, context: Tensor, after: Tensor) -> Tensor:
    """[N, L1, width], [n, width], [N, L2, width] -> [N, L1 + n + L2, width], in the dtype of the towers."""
    return torch.cat([before, context.to(before.dtype).expand(len(before), -1, -1), after], dim=1)


def _first_difference(a: Tensor, b: Tensor) -> int:
    differs = (a != b).nonzero()
    return int(differs[0]) if len(differs) else len(a)
